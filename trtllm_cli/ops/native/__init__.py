"""The native CPU executor: a recorded plan, weights packed for the CPU, and a C++ interpreter behind a plain C ABI.

Needs numpy and a C++ compiler (or a prebuilt library), never torch. See :mod:`.plan` for how the forward pass is
recorded, :mod:`.packing` for the weight formats, :mod:`.library` for how the library is found or built, and
:mod:`.model` for running an engine.
"""
