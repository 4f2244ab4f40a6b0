"""dpnn trains one convolutional network on many machines at once, over MPI.

The map of the house (a room imports only from the floors below it):

    cli  preview                       the commands; what `dpnn plan` shows
    train  asynchronous  serving       the training loop (read train.py first), those of workers and of servers;
    recovery  regroup  prepare         where a rank dies, who goes on, and from where; what rank 0 reads for all;
    timetable  course  evaluate        the steps of a run, of an asynchronous one; held-out data;
    planning  balance  needs           where layers go; lanes by speed; memory that ranks need;
    cluster                            batch systems, and whether all is there
    strategies  checkpoint  state      what becomes of gradients; what a run writes, how its parts bring it
    saving  observe  locations         together, and when; what it tells; where the data lie
    models  plan  optim                networks by name; who computes what, and when; updates of the parameters
    nn  backends  comm  data           what a network is; how a layer is computed; MPI; shards and their order
    errors  config  philox             what can go wrong; the job file; random numbers;
    team  native  memory               this rank's threads; our C kernels; where arrays lie, on the host or a GPU;
    machine  caches                    what the machine lets its processes have; what is kept for other runs

For use from outside: `dpnn.nn` describes networks, `dpnn.models` has known ones, `dpnn.data` reads and packs shards.
Only `comm` and `strategies` import mpi4py, only `data` and `checkpoint` h5py, only `backends.cuda` CuPy.
"""

__version__ = "0.1.0"
