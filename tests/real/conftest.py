"""The Ray of the tests of jobs, for those that give jobs real volumes."""

from tests.jobs.conftest import cases_here, local_ray, s3_server

__all__ = ["cases_here", "local_ray", "s3_server"]
