"""What of a run there is to show, and what to say of what there is not: for the page and for the terminal."""

from __future__ import annotations

from legolm.report.page import number
from legolm.runs import STAGES, Data, Others, PrivacySummary, Speaker, Stage, Summary, Weights

SPEAKERS: dict[Speaker, str] = {
    "before": "block before",
    "local": "trained alone",
    "final": "after the federation",
    "llm": "the LLM",
}
"""Whose answers samples have."""


def stages_of(summary: Summary) -> list[Stage]:
    """The stages that this run has."""
    tables = [client.loss(data) for client in summary.clients for data in scored(summary)]
    return [stage for stage in STAGES if any(number(table.get(stage)) is not None for table in tables)]


def scored(summary: Summary) -> list[Data]:
    """The data that some client's block was scored on."""
    found: list[Data] = ["own"] if any(client.own for client in summary.clients) else []
    return [*found, "others"] if any(client.others for client in summary.clients) else found


def sampled(others: Others) -> list[str]:
    """A sentence where others' data are a sample."""
    if not others.sampled:
        return []
    return [
        f"Others’ data are a sample: each block was scored on the test data of {others.asked} of the {others.there} "
        "other clients, the same ones in every stage, drawn by the run’s seed."
    ]


def points_of(summary: Summary) -> list[Weights]:
    """The mixtures that some client could end with, from the most global on."""
    longest = max((client.mixtures for client in summary.clients), key=len, default=[])
    return [one.weights for one in longest]


def guarantee(privacy: PrivacySummary, rounds: int) -> str:
    """What differential privacy the rounds have."""
    whom = "client" if privacy.level == "client" else "training example of a client"
    noise = "" if privacy.noise_multiplier is None else f", noise multiplier {privacy.noise_multiplier:.3g}"
    said = (
        f"Differential privacy of one {whom}: epsilon {privacy.epsilon:.3g} at delta {privacy.delta:g} after {rounds} "
        f"rounds (clipping norm {privacy.clip:g}{noise}); scores and the choice of the best round are not in it."
    )
    if privacy.stopped and privacy.budget is not None:
        said += f" The run stopped there: another round would have passed its budget, {privacy.budget:g}."
    return said


def notes(summary: Summary) -> list[str]:
    """Sentences on what nobody scored, or on a sample only, and what was changed on the way."""
    found = sampled(summary.others)
    if summary.privacy:
        found.append(guarantee(summary.privacy, summary.rounds))
    found += [
        f"{one.field} was changed from {one.old} to {one.new} after round {one.rounds}." for one in summary.changes
    ]
    if summary.others.asked == 0 < summary.others.there:
        found.append("Each block was scored on its own client’s data only: there are no figures on others’ data.")
    if summary.bytes_scoring:
        found.append(
            f"Asking clients for their scores took {summary.bytes_scoring / 1e6:,.2f} MB in all, both ways: it is in "
            "the rounds’ bytes, and not in the blocks’."
        )
    if summary.bytes_alone:
        found.append(
            f"Training outside the rounds took {summary.bytes_alone / 1e6:,.2f} MB in all, both ways, with the scores "
            "of what it gave: it is in no round’s bytes."
        )
    if summary.llm.loss_before is None:
        found.append("Nobody scored the LLM: the server has no data of its own (evaluate.server_data).")
    for client in summary.clients:
        for stage, reason in client.refused.items():
            what = "training alone" if stage == "local" else "personal model"
            found.append(f"The {what} of {client.id} was refused: {reason}.")
        lacking = {
            entry.round: one.reason for entry in summary.history for one in entry.unscored if one.client == client.id
        }
        if lacking:
            where, why = ", ".join(map(str, lacking)), next(iter(lacking.values()))
            found.append(
                f"The scores of {client.id} are missing in round {where}, and no round was chosen by them: {why}."
            )
    return found
