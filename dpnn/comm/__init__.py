"""MPI: `world.start` and how a job ends, `mesh.Mesh`, `faults.wait`, `reduce.BucketReducer`, `lifted.lifted` (sums of
what lies on GPUs), `watchdog.Watchdog` (nothing hangs), `launch.launch`.

Nothing here imports mpi4py when it is imported: `world.start` does, once the environment is ready, so that `--help`
and `dpnn launch` never initialise MPI. Everything else takes its communicators from a `World`.
"""
