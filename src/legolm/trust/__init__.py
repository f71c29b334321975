"""Who is who in a federation of devices: a CA, the server's certificate, the devices' keys and their register."""

from legolm.trust.authority import (
    CA,
    KEY,
    PUBLIC,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    identity_key,
    make_authority,
    make_key,
    make_server,
    server_files,
    write_secret,
)
from legolm.trust.devices import (
    REGISTER,
    Device,
    add_device,
    pem_of,
    read_devices,
    read_roster,
    revoke_device,
    roster,
    write_roster,
)

__all__ = [
    "CA",
    "KEY",
    "PUBLIC",
    "REGISTER",
    "SERVER_CERTIFICATE",
    "SERVER_KEY",
    "Device",
    "add_device",
    "identity_key",
    "make_authority",
    "make_key",
    "make_server",
    "pem_of",
    "read_devices",
    "read_roster",
    "revoke_device",
    "roster",
    "server_files",
    "write_roster",
    "write_secret",
]
