"""A real S3 server in this process, for tests of object stores: import the fixture `s3_server`."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def s3_server():
    """An S3 server in this process, with bucket "data"."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    import boto3
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket="data")
    yield
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
    patch.undo()
