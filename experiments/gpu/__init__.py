"""Everything that only a GPU can tell, in ten minutes: `python -m experiments.gpu`.

The items run one after the other, each in a process of its own with a time limit, so that one that
fails or hangs costs only its own line of the table: the tests of the CUDA paths, the machine's
limits, the races of `experiments.bench`, the throughput of NanoGPT, and as many paired seeds of
airbench as the time allows. Nothing is downloaded. CIFAR-10 is used if it is there.
"""
