"""All engines give the same sums, charges and adapter from the same seeds."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deployment import deployed, small_recipe
from drencoder.errors import DataError
from drencoder.federated.remote.engine import RoundTimeouts, make_remote_engine
from drencoder.federated.remote.roster import named_keys
from drencoder.federated.remote.site import Site
from drencoder.flower.client_app import make_client_app, open_site
from drencoder.flower.keys import make_certificates, read_public_keys
from drencoder.flower.transport import GridTransport
from drencoder.recipe.recipe import Recipe
from drencoder.runs import run as experiment
from drencoder.runs.verify import verify_run
from flower_grid import InProcessGrid

SECURE = ["privacy.trust=secure-aggregation", "federation.nodes=3"]
TRUSTS = {"local": [], "central": ["privacy.trust=central"], "secure-aggregation": SECURE}
ENCODERS = {
    "adaptive": ["privacy.clip=adaptive"],
    "measured clip": ["privacy.clip_l2=0"],
    "refreshed": ["encoder.name=hybrid", "privacy.clip=adaptive", "encoder.ratio=0",
                  "encoder.gate=warn"],
    "kronecker": ["encoder.name=kronecker", "prior.public=embedded", "prior.provenance=made here"],
    "published": ["encoder.name=autoencoder", "privacy.noise_in=update", "encoder.gate=warn"],
    "fedcg": [
        "encoder.name=autoencoder", "prior.source=gradients", "encoder.gate=warn",
        "privacy.noise_in=update",
    ],
}  # fmt: skip


def replayed(*overrides: str) -> Recipe:
    return small_recipe("privacy.noise=replay", *overrides)


def in_process(recipe: Recipe, folder: Path, data: Callable[[int], str] | None = None) -> experiment.RunResult:
    """Three sites in this process, behind Flower's own message format; `data` names each site's own text."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(recipe.to_toml())

    def app_of(site: Site):  # type: ignore[no-untyped-def]
        return make_client_app(lambda _: site)

    make_certificates(folder / "certs", 3, [])
    keys = named_keys(recipe, read_public_keys(folder / "certs" / "nodes"))
    sites = [
        open_site(
            str(folder / "recipe.toml"),
            f"{i}/3",
            data=None if data is None else data(i),
            state=folder / f"{i}",
            key=folder / f"certs/node{i}/key",
        )
        for i in range(3)
    ]
    grid = InProcessGrid([app_of(site) for site in sites])
    engine = make_remote_engine(GridTransport(grid), RoundTimeouts(quorum=1.0, nodes=3, wait=5), keys=keys)
    return experiment.run(recipe, folder / "run", engine=engine)


def simulated(recipe: Recipe, folder: Path) -> experiment.RunResult:
    folder.mkdir()
    (folder / "recipe.toml").write_text(recipe.to_toml())
    command = [sys.executable, "-m", "drencoder", "simulate", "recipe.toml", "--nodes", "3", "--out", "run"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return result_in(folder / "run")


def on_loopback(recipe: Recipe, folder: Path) -> experiment.RunResult:
    """TLS, node authentication, three sites: the documented commands."""
    with deployed(folder, recipe) as place:
        server = place.server("--quorum", "1")
        for number in range(3):
            place.node(number)
        assert server.wait(600) == 0, place.log("server").read_text()
    return result_in(folder / "run")


def result_in(folder: Path) -> experiment.RunResult:
    certificate = json.loads((folder / "certificate.json").read_text())
    return experiment.RunResult(folder, folder / "adapter", folder / "ledger.jsonl", [], certificate)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., experiment.RunResult]:
    """Runs of the local engine, one per recipe."""
    made: dict[str, experiment.RunResult] = {}

    def of(recipe: Recipe) -> experiment.RunResult:
        text = recipe.to_toml()
        if text not in made:
            made[text] = experiment.run(recipe, tmp_path_factory.mktemp("reference") / "run")
        return made[text]

    return of


def charges(run: experiment.RunResult) -> list[tuple[str, object, object, object]]:
    """The ledger without what differs between any two runs: run id and hashes, and which sites there were."""
    lines = [json.loads(line) for line in run.ledger.read_text().splitlines()]
    rows = [row for row in lines if row["kind"] != "site"]
    return [(row["kind"], row.get("slot"), row.get("event"), row.get("contributors")) for row in rows]


def same(first: experiment.RunResult, second: experiment.RunResult) -> None:
    one, two = (load_file(run.adapter / "adapter_model.safetensors") for run in (first, second))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-4, atol=1e-5), name
    assert charges(first) == charges(second)
    keys = ("observers", "bytes", "rounds", "statement", "stage1", "clip")
    assert {key: first.certificate[key] for key in keys} == {key: second.certificate[key] for key in keys}


@pytest.mark.parametrize("trust", TRUSTS)
def test_in_process_grid(trust: str, reference: Callable[..., experiment.RunResult], tmp_path: Path) -> None:
    recipe = replayed(*TRUSTS[trust])
    same(reference(recipe), in_process(recipe, tmp_path / "grid"))


@pytest.mark.parametrize("trust", TRUSTS)
@pytest.mark.parametrize("evaluation", ["none", "file"])
def test_a_server_needs_no_text_but_its_evaluation_data(trust: str, evaluation: str, tmp_path: Path) -> None:
    """Neither the clients' file, which is at the sites, nor owners in its own."""

    def rows(owners: list[str]) -> str:
        notes = [{"instruction": f"note {n} of {owner}", "response": f"{n}"} for owner in owners for n in range(2)]
        return "\n".join(json.dumps({**note, "ward": note["instruction"][10:]}) for note in notes)

    for site in range(3):
        owners = [f"s{site}-{number}" for number in range(10)]
        (tmp_path / f"site{site}.jsonl").write_text(rows(owners))
    own = tmp_path / "server.jsonl"
    own.write_text("\n".join(json.dumps({"instruction": f"case {n}", "response": f"{n}"}) for n in range(9)))
    recipe = replayed(
        *TRUSTS[trust], "federation.population=30", "data.source=ward.jsonl", "data.client_field=ward", "encoder.gate=warn",
        "evaluation.examples=99",
        f"evaluation.data={own if evaluation == 'file' else ''}",
    )  # fmt: skip
    result = in_process(recipe, tmp_path / "grid", lambda site: str(tmp_path / f"site{site}.jsonl"))
    certificate = result.certificate
    assert certificate["data"] == "the clients' own text, which stays at 3 sites"
    assert certificate["owners"] == "owners whom the sites' own files name"
    loss = certificate["results"]["this run"]["loss"]
    if evaluation == "file":
        assert loss["count"] == 9
        assert certificate["evaluation_rests_on"].endswith("which the server owns.")
    else:
        assert loss is None
        assert "cannot know whether it learned" in certificate["verdict"]
    assert verify_run(result.folder).trouble == ""


def test_a_server_that_would_set_records_aside_which_it_has_not_is_told_what_to_do(tmp_path: Path) -> None:
    engine = make_remote_engine(GridTransport(InProcessGrid([])), RoundTimeouts(nodes=3))
    recipe = replayed(f"data.source={tmp_path / 'ward.jsonl'}")
    with pytest.raises(
        DataError, match=r"does not exist.* name text that the server owns in evaluation\.data, or none"
    ):
        experiment.run(recipe, tmp_path / "run", engine=engine)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("encoder", ["adaptive", "refreshed", "kronecker"])
def test_every_query_that_can_be_summed_is_summed_alike(
    encoder: str, reference: Callable[..., experiment.RunResult], tmp_path: Path
) -> None:
    """Secure aggregation: nodes make the round's query again to the last bit, or their sums would not unmask to the same."""
    recipe = replayed(*ENCODERS[encoder], *SECURE, "encoder.gate=warn")
    same(reference(recipe), in_process(recipe, tmp_path / "grid"))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_kind_of_query_travels(
    encoder: str, reference: Callable[..., experiment.RunResult], tmp_path: Path
) -> None:
    """Moments, gradients, an adaptive clip, a basis of public text, trained tensors: the site rebuilds each."""
    recipe = replayed(*ENCODERS[encoder])
    same(reference(recipe), in_process(recipe, tmp_path / "grid"))


@pytest.mark.slow
def test_simulation(reference: Callable[..., experiment.RunResult], tmp_path: Path) -> None:
    recipe = replayed()
    same(reference(recipe), simulated(recipe, tmp_path / "simulation"))


@pytest.mark.slow
def test_loopback_deployment(reference: Callable[..., experiment.RunResult], tmp_path: Path) -> None:
    """Central trust; test_flower_deployment.py has the same for local trust, with kills."""
    recipe = replayed(*TRUSTS["central"])
    same(reference(recipe), on_loopback(recipe, tmp_path / "loopback"))


def test_the_comparison_sees_a_different_seed(reference: Callable[..., experiment.RunResult], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        same(reference(replayed()), in_process(replayed("seed=1"), tmp_path / "grid"))
