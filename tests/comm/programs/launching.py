"""launching.py N SCRIPT ARGS...: what `dpnn launch -n N` does, with a script in place of dpnn."""

import sys

from dpnn.comm.launch import launch

sys.exit(launch(int(sys.argv[1]), sys.argv[3:], program=(sys.argv[2],)))
