"""The servers, for the tests of the servers themselves."""

from servers.fixtures import moto_server, s3_server, seaweed_server

__all__ = ["moto_server", "s3_server", "seaweed_server"]
