"""The federated rounds: server and client mirrored, the wire between them, and who carries it."""
