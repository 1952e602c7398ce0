"""What a test needs to know of an S3 server, whichever it is and by whichever way it is reached."""

from dataclasses import dataclass, field, replace
from typing import Any

REGION = "us-east-1"


@dataclass(frozen=True, slots=True)
class S3:
    """An S3 server that runs, and the keys of one user of it."""

    url: str
    """Where it listens, without a slash at the end."""
    access_key: str
    secret_key: str = field(repr=False)

    def connect(self, **config: Any) -> Any:
        """Return a boto3 client that addresses buckets by path; `config` goes to `botocore.config.Config`."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(**{"s3": {"addressing_style": "path"}, **config}),
        )

    def through(self, url: str) -> "S3":
        """Return the same server as it is reached at `url`: that of a proxy in front of it."""
        return replace(self, url=url)

    def make_environ(self) -> dict[str, str]:
        """Return the variables by which every AWS client finds this server and its keys."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
        }
