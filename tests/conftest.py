"""What every test starts from: no settings of the developer's, one torch thread, no deadlines."""

import os

from hypothesis import settings

for name in [name for name in os.environ if name.startswith("DCNR_")]:
    del os.environ[name]
# Before anything loads torch: two test processes share the cores, and the number of threads reaches bits.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

settings.register_profile("dcnr", deadline=None, print_blob=True)
settings.load_profile("dcnr")
