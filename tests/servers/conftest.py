"""The servers, for the tests of the servers themselves."""

from servers.fixtures import hub, moto_server, s3_server, seaweed_server

__all__ = ["hub", "moto_server", "s3_server", "seaweed_server"]
