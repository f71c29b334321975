from __future__ import annotations

import json
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from legolm.errors import LegolmError
from legolm.report import print_summary, write_report
from legolm.report.page import Raw, number, short, tag
from legolm.report.plots import _spread, drawn
from legolm.report.run import render, verdict
from legolm.runs import Summary

HOSTILE = '<script>alert("$x_1$")</script>'


def scores(before: float, local: float, shared: float, personal: float) -> dict[str, float]:
    return {"before": before, "local": local, "global": shared, "personal": personal}


def client(name: str, block: str, own: dict[str, float], others: dict[str, float]) -> dict[str, Any]:
    exact = scores(0.0, 0.1, 0.25, 0.2)
    return {
        "id": name,
        "block": block,
        "refused": {},
        "own": own,
        "others": others,
        "own_exact_match": exact,
        "others_exact_match": dict(exact),
    }


def block(name: str, clients: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "method": "structured" if clients else "dense",
        "sparsity": 0.25 if clients else 0.0,
        "params": 107_000_000,
        "file_bytes": 215_000_000,
        "coverage": {"layers": 30, "kv_groups": 3, "neurons": 1024, "weights": 0.75, "hash": "c0"},
        "clients": clients,
        "bytes_up_per_round": 5_000_000,
        "bytes_down_per_round": 5_250_000,
        "train_s_per_round": 6.5,
    }


def entry(
    number: int, loss: float, clients: dict[str, dict[str, float]], refused: list[dict[str, str]]
) -> dict[str, Any]:
    return {
        "round": number,
        "llm": {"loss": loss, "exact_match": 0.1},
        "clients": clients,
        "validation": loss + 0.125,
        "llm_validation": loss + 0.25,
        "accepted": ["fr"] if number else [],
        "refused": refused,
        "bytes_up": 10_000_000,
        "bytes_down": 10_500_000,
        "seconds": 20.0,
    }


@pytest.fixture
def raw() -> dict[str, Any]:
    """Two clients whose means a person can take: others' data 2.5 against 4, own data 1.9 against 2."""
    reason = "delta layers.3.mlp.up_proj.B is not finite"
    start = {"fr": {"own": 4.0, "others": 4.25}, "de": {"own": 4.5, "others": 4.25}}
    end = {"fr": {"own": 2.0, "others": 2.0}, "de": {"own": 2.4, "others": 3.0}}
    return {
        "schema_number": 2,
        "run": "demo",
        "run_id": "4f1c",
        "scores": "everyone",
        "others": {"asked": 1, "there": 1},
        "model": "starter",
        "seed": 7,
        "base_fingerprint": "9f2c41e0",
        "wall_s": 431.2,
        "seconds": {"blocks": 120.0, "local": 80.1, "rounds": 160.0, "somewhere": 30.0},
        "machine": {"cpu": "a processor", "cores": 2, "memory_gb": 23.5},
        "versions": {"legolm": "0.1.0", "torch": "2.13.0"},
        "engine": "flower",
        "rounds": 2,
        "best_round": 2,
        "blocks": [block("llm", []), block("mlp-1024", ["fr"]), block("layers-20", ["de"])],
        "clients": [
            client("de", "layers-20", scores(4.5, 2.2, 2.4, 2.0), scores(4.25, 3.5, 3.0, 3.1)),
            client("fr", "mlp-1024", scores(4.0, 1.8, 2.0, 1.8), scores(4.25, 4.5, 2.0, 2.1)),
        ],
        "llm": {
            "best_round": 2,
            "loss_before": 4.0,
            "loss_after": 1.5,
            "exact_match_before": 0.02,
            "exact_match_after": 0.2,
        },
        "bytes_up_per_round": 10_000_000,
        "bytes_down_per_round": 10_500_000,
        "history": [
            entry(0, 4.0, start, []),
            entry(1, 2.75, start, [{"client": "de", "reason": reason}]),
            entry(2, 1.5, end, []),
        ],
    }


def typed(raw: dict[str, Any]) -> Summary:
    return Summary.model_validate(raw)


@pytest.fixture
def summary(raw: dict[str, Any]) -> Summary:
    return typed(raw)


def words(page: str) -> str:
    return re.sub(r"<style>.*?</style>|<[^>]+>", "", page, flags=re.DOTALL)


def row(page: str, name: str) -> str:
    found = re.search(rf'<tr[^>]*><th scope="row">{name}</th>.*?</tr>', page)
    assert found
    return found[0]


def test_the_page_says_who_took_part_and_what_it_cost(summary: Summary) -> None:
    page = render(summary)
    for text in ("demo", "starter", "a processor", "7 min 11 s", "fr", "de", "llm", "mlp-1024", "layers-20"):
        assert text in words(page)
    assert "107.0" in page and "215.0" in page and "5.25" in page and "25.0 %" in page
    assert "legolm 0.1.0" in page and "9f2c41e0" in page and "Seed 7" in page
    assert "somewhere" in page and "all else" in page and "41.1 s" in page  # 431.2 - 390.1
    assert len(page.encode()) < 200_000


def test_the_verdict_is_what_one_computes_by_hand(summary: Summary) -> None:
    llm, others, own = verdict(summary)
    assert [one.name for one in (llm, others, own)] == [
        "LLM, all clients’ data",
        "Blocks, others’ data",
        "Blocks, own data",
    ]
    assert llm.numbers == "4.000 → 1.500" and "62.5 % better" in llm.text and "from 2.0 % to 20.0 %" in llm.text
    assert others.numbers == "2.500 vs 4.000"
    assert "2 of 2 clients (mean 2.500 against 4.000: 37.5 % better)" in others.text
    assert "Personal models have 2.60" in others.text
    assert "5.0 % better than local-only training (mean 1.900 against 2.000; better for 1 of 2 clients)" in own.text
    assert "global update alone: 10.0 % worse" in own.text


def test_the_verdict_does_not_hide_bad_news(raw: dict[str, Any]) -> None:
    raw["llm"] |= {"loss_after": 5.0, "best_round": 0}
    for each in raw["clients"]:
        each["own"]["personal"] = each["own"]["local"] + 1
        each["others"]["global"] = each["others"]["local"] + 1
    llm, others, own = verdict(typed(raw))
    assert "25.0 % worse" in llm.text and "No round beat the start" in llm.text
    assert "0 of 2 clients (mean 5.000 against 4.000: 25.0 % worse)" in others.text
    assert "50.0 % worse than local-only training" in own.text


def test_equal_is_neither_better_nor_worse(raw: dict[str, Any]) -> None:
    for each in raw["clients"]:
        each["own"]["personal"] = each["own"]["local"]
    assert "no better and no worse than local-only training" in verdict(typed(raw))[2].text


def test_everything_from_the_summary_is_escaped(raw: dict[str, Any]) -> None:
    text = json.dumps(raw)
    for name in ("demo", "starter", "fr", "mlp-1024", "flower", "structured", "a processor", "9f2c41e0", "somewhere"):
        text = text.replace(f'"{name}"', json.dumps(HOSTILE + name))
    text = text.replace("delta layers.3", json.dumps(HOSTILE)[1:-1]).replace('"0.1.0"', json.dumps(HOSTILE))
    page = render(typed(json.loads(text)))
    assert "<script" not in page
    assert "&lt;script&gt;alert(&quot;$x_1$&quot;)&lt;/script&gt;fr" in page
    assert tag("p", "<", Raw("<br>"), title='"') == '<p title="&quot;">&lt;<br></p>'


def test_the_page_loads_nothing(summary: Summary) -> None:
    page = render(summary)
    assert "http" not in page and "<script" not in page and "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', page))
    assert re.findall(r"url\((?!#)", page) == []


def test_ids_are_unique_and_references_resolve(summary: Summary) -> None:
    page = render(summary)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 0
    used = re.findall(r'href="#([^"]+)', page) + re.findall(r"url\(#([^)]+)", page)
    assert used and set(used) <= set(ids)
    assert page.count("<svg") == 4 and "#a0a0" not in page and "DejaVu" not in page


def test_the_same_summary_gives_the_same_page(raw: dict[str, Any]) -> None:
    assert render(typed(raw)) == render(typed(deepcopy(raw)))


def test_figures_name_each_client(summary: Summary) -> None:
    for drawing in re.findall(r"<svg.*?</svg>", render(summary), flags=re.DOTALL):
        assert "<title>fr · mlp-1024</title>" in drawing and re.search(r"<text [^>]*>fr</text>", drawing)
        assert 'class="tip c0"' in drawing and "var(--b0)" in drawing  # fr: the first block's client


def test_a_name_that_looks_like_mathematics_stays_as_it_is(raw: dict[str, Any]) -> None:
    page = render(typed(json.loads(json.dumps(raw).replace('"fr"', '"a$_1$<"'))))
    assert re.search(r"<text [^>]*>a\$_1\$&lt;</text>", page)


def test_refused_updates_show_their_reason_and_the_best_round_its_star(summary: Summary) -> None:
    page = render(summary)
    assert "<b>de</b>: delta layers.3.mlp.up_proj.B is not finite" in row(page, "1")
    assert "★ 1.62" in words(row(page, "2")) and "★" not in row(page, "1")


def test_a_run_without_rounds_says_nothing_of_them(raw: dict[str, Any]) -> None:
    for one in raw["clients"]:
        for figures in ("own", "others", "own_exact_match", "others_exact_match"):
            one[figures] = {stage: one[figures][stage] for stage in ("before", "local")}
    raw |= {"rounds": 0, "best_round": 0, "history": raw["history"][:1]}
    raw["llm"] |= {"best_round": 0, "loss_after": 4.0}
    found, page = verdict(typed(raw)), words(render(typed(raw)))
    assert [one.name for one in found] == ["Blocks, own data", "Blocks, others’ data"]
    assert found[0].text.endswith("(mean 2.000 against 4.250; better for 2 of 2 clients).")
    assert "trained alone" in page and "★" not in page
    assert "No round beat" not in page and "after the global update" not in page


def test_names_that_begin_alike_differ_in_figures() -> None:
    names = [short(f"hospital-north-{ward}") for ward in ("surgery", "eyes")]
    assert names == ["hospit…surgery", "hospit…th-eyes"] and short("hospital-north") == "hospital-north"


def test_bold_is_the_best_of_those_that_trained(raw: dict[str, Any]) -> None:
    bold = re.findall(r"<b>([^<]+)</b>", row(render(typed(raw)), "de"))
    assert bold == ["25.0 %", "2.000", "3.000", "25.0 %"]
    tied = row(render(typed(raw)), "fr")
    assert tied.count("<b>1.800</b>") == 2
    for each in raw["clients"]:
        each["own"] |= {"local": 1.0, "global": 1.001, "personal": 0.999}
        each["own_exact_match"] = dict.fromkeys(each["own"], 0.0)
    assert "<b>1.00</b>" not in render(typed(raw)) and "<b>0.0 %</b>" not in render(typed(raw))


def test_a_run_without_local_only_and_personal_step(raw: dict[str, Any]) -> None:
    for each in raw["clients"]:
        for key in ("own", "others", "own_exact_match", "others_exact_match"):
            del each[key]["local"], each[key]["personal"]
    page = render(typed(raw))
    assert "local-only training" not in page and "Diamonds" not in page and ">personal model<" not in page
    _, others, own = verdict(typed(raw))
    assert "better than before the rounds for 2 of 2" in others.text and "no local-only baseline" in others.text
    assert "no personal models" in own.text and "48.2 % better" in own.text  # 2.2 against 4.25


def test_losses_may_be_missing_or_no_numbers(raw: dict[str, Any]) -> None:
    raw["clients"][0]["others"], raw["clients"][0]["others_exact_match"] = {}, {}
    raw["history"][1]["clients"]["fr"] = {"own": float("inf"), "others": None}
    raw["history"][1]["llm"]["loss"] = raw["llm"]["loss_after"] = float("nan")
    assert "1 of 1 clients (mean 2.000 against 4.500" in verdict(typed(raw))[1].text
    page = render(typed(raw))
    assert "4.000 → –" in page and "nan" not in words(page).lower()
    assert "<td><span>–</span>" in row(page, "mean")  # no mean over fewer clients than there are


def own_only(raw: dict[str, Any]) -> dict[str, Any]:
    """The same run where each may score its own data only."""
    clients = [one | {"others": {}, "others_exact_match": {}} for one in raw["clients"]]
    history = [
        entry | {"clients": {id: one | {"others": None} for id, one in entry["clients"].items()}}
        for entry in raw["history"]
    ]
    others = {"asked": 0, "there": 1}
    return raw | {"scores": "own", "others": others, "clients": clients, "history": history}


def without_llm(raw: dict[str, Any]) -> dict[str, Any]:
    nothing = {f"{measure}_{when}": None for measure in ("loss", "exact_match") for when in ("before", "after")}
    history = [entry | {"llm": None, "llm_validation": None} for entry in raw["history"]]
    return raw | {"llm": {"best_round": 2} | nothing, "history": history}


def test_where_each_scores_its_own_data_the_page_says_so_and_has_no_empty_columns(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = typed(own_only(raw))
    assert [one.name for one in verdict(summary)] == ["LLM, the server’s own data", "Blocks, own data"]
    page = render(summary)
    assert page.count("<svg") == 2 and "(a)" not in page
    assert "no figures on others’ data" in page and "all clients’ data" not in page
    assert row(page, "de").count("<td") == 5  # the block, and four stages on own data
    print_summary(summary, tmp_path)
    said = capsys.readouterr().out
    assert "on other clients' test data" not in said and "on the clients' own test data" in said
    assert "LLM on the server's own test data: 4.000 before" in said


def test_a_run_whose_llm_nobody_scored(raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = typed(without_llm(own_only(raw)))
    assert [one.name for one in verdict(summary)] == ["Blocks, own data"]
    page = render(summary)
    assert "Nobody scored the LLM" in page and "LLM loss" not in page and "LLM, validation" not in page
    assert ">LLM</text>" not in page and ">LLM</text>" in render(typed(raw))
    assert "thick line" not in page
    assert row(page, "2").count("<td") == 6  # accepted, refused, validation, up, down, time
    print_summary(summary, tmp_path)
    said = capsys.readouterr().out
    assert "Nobody scored the LLM" in said and "LLM on" not in said and "431 s." in said
    assert [one["llm_loss"] for one in [entry.row() for entry in summary.history]] == [None] * 3


def test_a_sample_of_the_others_is_said_and_all_of_them_not(raw: dict[str, Any]) -> None:
    assert "sample" not in render(typed(raw))
    raw["others"] = {"asked": 8, "there": 24}
    assert "on the test data of 8 of the 24 other clients" in words(render(typed(raw)))


def test_nobody_has_others_data_or_rounds(raw: dict[str, Any]) -> None:
    for each in raw["clients"]:
        each["others"] = {}
    raw["history"], raw["rounds"] = raw["history"][:1], 0
    raw["best_round"] = raw["llm"]["best_round"] = 0
    assert len(verdict(typed(raw))) == 2
    assert render(typed(raw)).count("<svg") == 2  # own data by round and by client
    raw["history"] = []
    assert render(typed(raw)).count("<svg") == 1


def test_many_clients_and_rounds_go_unnamed_but_all_are_there(raw: dict[str, Any]) -> None:
    first = raw["clients"][1]
    raw["clients"] = [first | {"id": f"site {i}"} for i in range(30)]
    page = render(typed(raw))
    assert all(f"site {i} · mlp-1024" in page for i in range(30))


def test_of_very_many_clients_the_figures_show_some_of_each_block_and_the_page_says_so(raw: dict[str, Any]) -> None:
    first = raw["clients"][1]
    names = [f"site {i:03}" for i in range(96)]
    raw["clients"] = [first | {"id": name, "block": ("mlp-1024", "heads-2")[i % 2]} for i, name in enumerate(names)]
    raw["blocks"] = [block("mlp-1024", names[::2]), block("heads-2", names[1::2]), block("llm", [])]
    found = typed(raw)
    page = render(found)
    assert [client.id for _, client in drawn(found)] == [*names[::4], *names[1::4]]  # 24 of the 48 of each block
    assert "site 004 · mlp-1024" in page and "site 002 · mlp-1024" not in page and ".c2:hover" in page
    assert all(f">{name}</th>" in page for name in names) and ".c1:hover" not in page
    assert "Figures show 48 of the 96 clients, spread evenly over the blocks; the table has all." in page
    raw["clients"] = raw["clients"][:48]
    assert len(drawn(typed(raw))) == 48 and "Figures show" not in render(typed(raw))


def test_numbers() -> None:
    assert [number(value) for value in (1, 0.5, None, float("inf"), float("nan"))] == [1.0, 0.5, None, None, None]
    assert _spread([1.0, 1.0, 5.0], 1.0, 0.0, 9.0) == [0.5, 1.5, 5.0]
    assert _spread([0.0, 0.0], 1.0, 0.0, 9.0) == [0.5, 1.5]
    assert _spread([9.0, 9.0], 1.0, 0.0, 9.0) == [7.5, 8.5]


def test_a_write_that_fails_leaves_the_old_page(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    write_report(typed(raw), path)
    old = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(LegolmError, match=r"report.html: cannot be written \(no\); move away"):
            write_report(typed(raw | {"run": "other"}), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    write_report(typed(raw | {"run": "other"}), path)
    assert "<h1>other</h1>" in path.read_text(encoding="utf-8")


def test_without_matplotlib_the_error_says_what_to_install(
    summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LegolmError, match=r"pip install 'legolm\[report\]'"):
        write_report(summary, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
