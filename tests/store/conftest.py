"""What tests of the store share: an S3 server."""

from tests.store.object_store import bucket, proxy, s3_server

__all__ = ["bucket", "proxy", "s3_server"]
