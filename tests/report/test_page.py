"""The page of a plan: what it shows, that it is self-contained, and that a browser renders it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from support import checkpoints
from support.gated_checkpoints import gated_mixtral
from support.sampled_plans import sampled

from moescale.errors import MoescaleError, UsageError
from moescale.options import Options
from moescale.planning.decide import make_plan
from moescale.planning.plan import Plan
from moescale.report.chart import LINE_STYLES
from moescale.report.page import page, write
from moescale.report.terminal import plan_text
from moescale.storage.base import SourceId
from moescale.storage.local.source import LocalSource
from moescale.storage.location import LocalPath
from moescale.storage.opening import check_output_file

HOSTILE = "</title></style></svg><script>alert('1')</script>&\"\x00\x1b[31m\udc80"
LAYERS = [*map(str, range(3, 61)), "mtp.0", "mtp.1"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan for a local Mixtral, 2 to 3, by the closed form."""
    folder = checkpoints.mixtral(tmp_path_factory.mktemp("source") / "tiny-mixtral")
    return make_plan(LocalSource(folder), Options(experts=3))


@pytest.fixture(scope="module")
def plans(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    """Plans of every kind."""
    folder = tmp_path_factory.mktemp("other")
    deepseek = checkpoints.deepseek(folder / "deepseek", routed_scaling_factor=2.5)
    own = Options(experts=3, factor=1.3)
    return {
        "closed form": plan,
        "one layer": sampled(plan, ["0"], 2, 3, run=True),
        "32 layers": sampled(plan, [str(i) for i in range(32)], 2, 4),
        "24 of 48": sampled(plan, ["0"], 20, 24),
        "two stacks": sampled(plan, LAYERS, 8, 16, run=True),
        "fold": make_plan(LocalSource(deepseek), Options(experts=3, fold="config")),
        "not renormalised": make_plan(
            LocalSource(checkpoints.qwen2(folder / "qwen2")), Options(experts=4)
        ),
        "counts by layer": replace(
            plan,
            experts=replace(plan.experts, trained=(2, 1), before=(2, 1)),
            factors={"0": 1.5**0.5, "1": 3**0.5},
            alternatives={
                "preserve": {"0": 1.5**0.5, "1": 3**0.5},
                "published": {"0": 1.5**-0.5, "1": 3**-0.5},
            },
        ),
        "unknown router": replace(plan, router=None, alternatives={}, options=own, rule=own.method),
        "hostile": replace(
            plan,
            source=SourceId(HOSTILE, Path(HOSTILE), None, None, HOSTILE),
            location=LocalPath(HOSTILE),
            files=(replace(plan.files[0], name=HOSTILE), *plan.files[1:]),
            warnings=(HOSTILE,),
        ),
    }


def parsed(text: str) -> ET.Element:
    """The page, parsed as XML."""
    assert text.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(text.encode("utf-8", "replace"))


def charts(root: ET.Element) -> dict[str, str]:
    """The title and description of every chart."""
    found = root.iter("svg")
    return {svg.findtext("title") or "": svg.findtext("desc") or "" for svg in found}


def test_every_page_is_well_formed_and_needs_nothing_else(plans: dict[str, Plan]) -> None:
    """Each page is XML with unique ids, runs no script and fetches nothing."""
    for name, one in plans.items():
        text = page(one)
        root = parsed(text)
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids)), name
        assert not {"script", "link", "img", "iframe", "object", "use"} & {
            e.tag for e in root.iter()
        }
        attributes = {key for element in root.iter() for key in element.attrib}
        assert not {"src", "href", "action"} & attributes, name
        assert not any(key.startswith("on") for key in attributes), name
        assert not re.search(r"https?:|//|@import|url\((?!#)", root.findtext("head/style") or "")


def test_text_from_outside_stays_text(plans: dict[str, Plan]) -> None:
    """Markup in a path, a file name or a warning is shown literally, without control characters."""
    root = parsed(page(plans["hostile"]))
    shown = [element.text or "" for element in root.iter() if "alert" in (element.text or "")]
    assert len(shown) >= 5
    assert all("<script>alert('1')</script>&\"" in text for text in shown)
    assert not any(character in "".join(shown) for character in "\x00\x1b")


def test_every_chart_says_what_it_shows(plans: dict[str, Plan]) -> None:
    """A chart has a title and a description."""
    for name, one in plans.items():
        for title, description in charts(parsed(page(one))).items():
            assert title and description.endswith("."), name


def test_the_charts_are_those_that_the_plan_can_fill(plans: dict[str, Plan]) -> None:
    """Gate weights need samples, correlation needs a run, and the norm needs a known router."""
    always = {"Factors"}
    norm = {"Norm of the routed output"}
    gate_weights = {f"Gate weights of layer {layer}" for layer in ("3", "23", "42", "mtp.1")}
    correlation = {"Correlation of the chosen experts' outputs"}
    for name, wanted in {
        "closed form": always | norm,
        "fold": always | norm,
        "counts by layer": always | norm,
        "unknown router": always,
        "two stacks": always | norm | gate_weights | correlation,
        "32 layers": always
        | norm
        | {f"Gate weights of layer {layer}" for layer in ("0", "10", "21", "31")},
    }.items():
        assert set(charts(parsed(page(plans[name])))) == wanted, name


def test_rules_that_agree_share_a_line(plans: dict[str, Plan]) -> None:
    """Without renormalisation, preserve and published share one line with both names."""
    assert "preserve, published (this plan)" in page(plans["not renormalised"])
    text = page(plans["closed form"])
    assert "preserve (this plan)" in text
    assert ">published<" in text


def test_lines_differ_by_more_than_their_colour() -> None:
    """No two rules have the same marker, or the same colour."""
    markers = [style.marker for style in LINE_STYLES.values()]
    colours = [style.colour for style in LINE_STYLES.values()]
    assert len(set(markers)) == len(markers)
    assert len(set(colours)) == len(colours)


def test_measured_norms_are_those_of_the_run(plans: dict[str, Plan]) -> None:
    """The config edit has the measured ratio; each rule has that ratio times its factor."""
    one = plans["one layer"]
    sample, compared = one.samples["0"], one.comparison
    assert sample.before.norm is not None and sample.after.norm is not None
    ratio = sample.after.norm / sample.before.norm
    assert compared.basis == "measured"
    assert compared.norms["none"][0] == pytest.approx(ratio, rel=1e-5)
    assert compared.norms["measured"][0] == pytest.approx(1, rel=1e-12)
    assert compared.norms["preserve"][0] == pytest.approx(ratio * 1.5**0.5, rel=1e-5)
    assert compared.norms["published"][0] == pytest.approx(ratio / 1.5**0.5, rel=1e-5)


def test_noted_factors_of_a_measurement_give_its_norms(plans: dict[str, Plan]) -> None:
    """A rerun has only the factors, and draws the norms of the run that measured them."""
    one = plans["two stacks"]
    rerun = replace(one, samples={})
    norms, compared = one.comparison.norms, rerun.comparison
    assert compared.basis == "noted"
    for rule in ("none", "preserve", "published", "measured"):
        assert compared.norms[rule] == norms[rule]
    assert compared.norms["measured"] == pytest.approx((1.0,) * len(LAYERS))
    assert "relative to trained, measured earlier" in page(rerun)


def test_given_factors_are_drawn_by_the_closed_form_which_is_named(plan: Plan) -> None:
    """Their origin is unknown, so the chart says what its norms assume."""
    folder = Path(plan.source.id)
    one = make_plan(LocalSource(folder), Options(experts=3, factors=dict.fromkeys("01", 1.5)))
    assert one.comparison.basis == "balanced"
    assert one.comparison.norms["own"] == pytest.approx((1.5 / 1.5**0.5,) * 2)
    assert "relative to trained, if the gate is balanced" in page(one)


@pytest.mark.parametrize("rule", ["gates", "preserve", "none"])
def test_text_json_and_page_say_the_same_norms(rule: str, tmp_path: Path) -> None:
    """All use one comparison, by layer if layers differ, with an entry for the chosen rule."""
    gated_mixtral(tmp_path)
    one = make_plan(LocalSource(tmp_path), Options(experts=3, rule=rule))
    text, whole = plan_text(one), unescape(re.sub(r"<[^>]+>", " ", page(one)))
    norms = json.loads(json.dumps(one.as_json()))["predicted_norm"]
    assert norms == one.predicted_norm and rule in norms
    assert (rule == "gates") == isinstance(norms["none"], dict)
    for name, norm in norms.items():
        values = [norm] if isinstance(norm, float) else list(norm.values())
        assert values == pytest.approx(one.comparison.norms[name][: len(values)])
        ends = sorted({f"{value:.3f}" for value in values})
        line = next(line for line in text.splitlines() if re.match(rf"(?:->)? +{name} ", line))
        assert f"x {' to '.join(ends)}" in line
        assert all(end in whole for end in ends)


def test_sampled_norms_come_from_the_gate_weights(plans: dict[str, Plan]) -> None:
    """Without a run, the norm is predicted from A and B of each layer."""
    one = plans["32 layers"]
    compared = one.comparison
    assert compared.basis == "sampled"
    assert "measured" not in compared.factors
    for norm, sample in zip(compared.norms["none"], one.samples.values(), strict=True):
        ratio = (sample.after.squares / sample.before.squares) ** 0.5
        assert norm == pytest.approx(ratio, rel=1e-5)


def test_counts_by_layer_have_closed_forms_by_layer(plans: dict[str, Plan]) -> None:
    """A plan with different counts by layer is predicted layer by layer."""
    compared = plans["counts by layer"].comparison
    assert compared.norms["none"] == pytest.approx((1.5**-0.5, 3**-0.5))
    assert compared.factors["published"] == pytest.approx((1.5**-0.5, 3**-0.5))


def test_an_unknown_router_has_factors_only(plans: dict[str, Plan]) -> None:
    """Without a known router no norm is predicted, and the page says why."""
    compared = plans["unknown router"].comparison
    assert compared.basis == "unknown" and not compared.norms
    assert set(compared.factors) == {"none", "own"}
    assert "cannot be predicted" in page(plans["unknown router"])


def test_the_page_is_not_written_into_a_checkpoint(plan: Plan, tmp_path: Path) -> None:
    """A path inside the source or the destination is refused before anything is written."""
    folders = (Path(plan.source.id), tmp_path / "out")
    for path in (Path(plan.source.id) / "r.html", tmp_path / "out" / "r.html"):
        with pytest.raises(UsageError, match="lies in"):
            check_output_file("--report", path, *folders)
        assert not path.exists()
    with pytest.raises(MoescaleError, match="No such file or directory"):
        write(plan, tmp_path / "missing" / "r.html")
    check_output_file("--report", tmp_path / "r.html", *folders)
    assert not (tmp_path / "r.html").exists()
    write(plan, tmp_path / "r.html")
    parsed((tmp_path / "r.html").read_text(encoding="utf-8"))


def test_a_plan_by_the_routers_shows_what_was_sampled(tmp_path: Path) -> None:
    """The line of the rule gates keeps the norm, and each layer has a chart of its gate weights."""
    gated_mixtral(tmp_path / "source")
    one = make_plan(LocalSource(tmp_path / "source"), Options(experts=3, rule="gates"))
    compared, found = one.comparison, charts(parsed(page(one)))
    assert compared.norms["gates"] == pytest.approx((1, 1))
    assert compared.factors["gates"] == tuple(one.factors.values())
    assert {"Gate weights of layer 0", "Gate weights of layer 1"} < set(found)
    assert "2 experts, as trained: medians" in found["Gate weights of layer 0"]


def test_what_a_sharper_gate_does_is_not_the_config_edit_alone(tmp_path: Path) -> None:
    """With --gate-scale, the line without a factor includes both, and its name says so."""
    gated_mixtral(tmp_path / "source")
    options = Options(experts=3, rule="gates", gate_scale=1.5)
    one = make_plan(LocalSource(tmp_path / "source"), options)
    for text in (page(one), plan_text(one)):
        assert "config edit and gate" in text
        assert "config edit alone" not in text


def test_one_layer_is_no_layers(plans: dict[str, Plan]) -> None:
    """Both the introduction and the table use the singular."""
    text = page(plans["one layer"])
    assert text.count("1 MoE layer of 6 routed experts") == 2
    assert "1 MoE layers" not in text


# In a browser -------------------------------------------------------------------------------------

CHECK = """<script>
const faults = [], root = document.documentElement;
root.style.width = "360px";
if (document.body.scrollWidth > 360) faults.push("the page is wider than the screen");
for (const svg of document.querySelectorAll("svg")) {
  const box = svg.viewBox.baseVal, texts = [...svg.querySelectorAll("text")];
  const boxes = texts.map(text => text.getBBox());
  if (svg.getBoundingClientRect().width < 200) faults.push("a chart is not drawn");
  boxes.forEach((a, i) => {
    const name = texts[i].textContent;
    if (a.x < 0 || a.x + a.width > box.width || a.y + a.height > box.height)
      faults.push("outside: " + name);
    boxes.slice(i + 1).forEach((b, j) => {
      if (a.x < b.x + b.width && b.x < a.x + a.width && a.y + 3 < b.y + b.height - 3
          && b.y + 3 < a.y + a.height - 3)
        faults.push("over one another: " + name + ", " + texts[i + 1 + j].textContent);
    });
  });
}
document.title = JSON.stringify([document.querySelectorAll("path").length, faults]);
</script>"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[str]:
    """A browser, if one is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser to draw the page with: none of {', '.join(names)} is installed")
    yield found


@pytest.mark.parametrize("name", ["two stacks", "hostile", "24 of 48"])
def test_a_browser_draws_it_at_phone_width(
    name: str, plans: dict[str, Plan], chromium: str, tmp_path: Path
) -> None:
    """The page fits a phone; in the charts, no text is cut off or overlaps another."""
    text = page(plans[name])
    file = tmp_path / "page.html"
    file.write_bytes(text.replace("</main>", f"</main>{CHECK}").encode("utf-8", "replace"))
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
        " --disable-component-update --disable-sync --dump-dom"
    )
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    child = subprocess.run(
        [chromium, *flags.split(), profile, file.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (title,) = re.findall(r"<title>(\[.*?\])</title>", child.stdout)
    paths, faults = json.loads(unescape(title))
    assert faults == []
    assert paths == sum(1 for _ in parsed(text).iter("path"))
