#!/bin/sh
# Runs the CUDA compiler and keeps its report on each kernel's resources beside the object; anything else it says is shown.
before= object=
for argument; do
    [ "$before" = -o ] && object=$argument
    before=$argument
done
"$@" >"$object.report" 2>&1
code=$?
grep -vE '^ptxas info +: (Compiling entry|Function properties|Used [0-9]|[0-9]+ bytes gmem|Compile time)|bytes stack frame|^$' \
    "$object.report" >&2
exit $code
