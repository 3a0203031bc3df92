"""Where calibration tokens come from: files, hub data sets, the text in ``builtin/``; and how texts are compared.

``builtin/*.txt`` were written for this package and stand under its licence. A part is one kind of text; a line that
holds only ``%%%%`` ends a section of it.
"""
