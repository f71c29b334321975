"""A client: the runtime that answers, and the site that it has."""

from legolm.federate.client.runtime import ClientRuntime
from legolm.federate.client.site import DeviceSite, Profile, Site, SiteOf, only, simulated

__all__ = ["ClientRuntime", "DeviceSite", "Profile", "Site", "SiteOf", "only", "simulated"]
