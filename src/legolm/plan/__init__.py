"""What a run will do and need, before it does anything."""

from legolm.plan.plan import Parts, Plan, PlannedClient, make_plan, parts_key, read_parts, upload_of

__all__ = ["Parts", "Plan", "PlannedClient", "make_plan", "parts_key", "read_parts", "upload_of"]
