"""Converting, loading and exporting a checkpoint of real size, against copying and reading its files.

`python -m benchmarks.conversion` makes a checkpoint with the names and shapes of a released one and random weights, has
every step run in a process of its own on files that are not in memory, and prints seconds, ratios to the peers of the
same run, and peak memory. `python -m benchmarks.conversion plan idefics-80b` plans a conversion over sparse files.

The peers are `cp` followed by `sync -f` for what writes a checkpoint, so that both sides end with their bytes on the
disk, and `cat` to /dev/null for what loads one.
"""

PYTORCH, COPY, NATIVE, EXPORTED = "pytorch", "copy", "native", "exported"  # the folders of a run
