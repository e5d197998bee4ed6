"""What every test starts from: no settings of the developer's, one torch thread, no deadlines; the S3 server."""

import os

from hypothesis import settings

from tests.s3_server import _server, s3, s3_alone

__all__ = ["_server", "s3", "s3_alone"]

for name in [name for name in os.environ if name.startswith(("DCNR_", "AWS_"))]:
    del os.environ[name]
# Before anything loads torch: two test processes share the cores, and the number of threads reaches bits.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

settings.register_profile("dcnr", deadline=None, print_blob=True)
settings.load_profile("dcnr")
