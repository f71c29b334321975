"""A client: the runtime that answers, and the site that it has."""

from legolm.federate.client.runtime import ClientRuntime, client_runtime

__all__ = ["ClientRuntime", "client_runtime"]
