"""The S3 servers of the tests: what the engine relies on, both of them do."""

import contextlib

import pytest
from servers.fixtures import BUCKET
from servers.s3 import S3

PART = 5 << 20


def test_parts_come_in_any_order_and_stay_hidden_until_the_end(s3_server: S3) -> None:
    with contextlib.closing(s3_server.connect()) as client:
        where = {"Bucket": BUCKET, "Key": "s3/parts"}
        upload = where | {"UploadId": client.create_multipart_upload(**where)["UploadId"]}
        sent = {}
        for number, body in ((3, b"end"), (1, b"a" * PART), (2, b"b" * PART)):
            sent[number] = client.upload_part(**upload, PartNumber=number, Body=body)["ETag"]
        listed = {part["PartNumber"]: part["ETag"] for part in client.list_parts(**upload)["Parts"]}
        assert listed == sent
        assert client.list_objects_v2(Bucket=BUCKET, Prefix="s3/parts").get("KeyCount") == 0
        parts = [{"PartNumber": number, "ETag": sent[number]} for number in (1, 2, 3)]
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        answer = client.get_object(**where, Range=f"bytes={2 * PART - 1}-{2 * PART + 1}")
        assert answer["Body"].read() == b"ben"
        assert answer["ContentLength"] == 3


def test_a_key_is_created_once(s3_server: S3) -> None:
    with contextlib.closing(s3_server.connect()) as client:
        client.put_object(Bucket=BUCKET, Key="s3/once", Body=b"first", IfNoneMatch="*")
        with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
            client.put_object(Bucket=BUCKET, Key="s3/once", Body=b"second", IfNoneMatch="*")
        assert client.get_object(Bucket=BUCKET, Key="s3/once")["Body"].read() == b"first"


def test_a_wrong_key_is_refused(seaweed_server: S3) -> None:
    stranger = S3(seaweed_server.url, seaweed_server.access_key, "guess")
    with contextlib.closing(stranger.connect()) as client, pytest.raises(Exception, match="SignatureDoesNotMatch"):
        client.list_objects_v2(Bucket=BUCKET)
    assert seaweed_server.secret_key not in repr(seaweed_server)
