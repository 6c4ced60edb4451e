"""The ClientApp: Flower's messages to a `Site` and back. Name `drencoder.flower.client_app:app` in your pyproject.toml.

It reads the site's settings from the node's own configuration (`flower-supernode --node-config`), never from the run's, which
the server writes: `recipe` (a file, or the name of a shipped one), `clients` (`0-9,12` or `1/3`; default
`partition-id/num-partitions`), `data` (default: the recipe's), `state` (folder of the site's ledger) and `min-noise`.
"""

import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from drencoder.encoders.unused_knobs import unused_knobs
from drencoder.errors import DrencoderError, RecipeError, report_crash
from drencoder.federated.remote.agreement import ClientSet, agreement
from drencoder.federated.remote.refusal import Refusal, refusal_frame
from drencoder.federated.remote.roster import is_secure
from drencoder.federated.remote.session import SecAggSession
from drencoder.federated.remote.site import Site
from drencoder.flower.transport import read_payload, wrap_payload
from drencoder.privacy.site_ledger import SiteLedger
from drencoder.reading import one_line
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.build import Components, SiteText, build_site


def make_client_app(site_of: Callable[[Context], Site]) -> ClientApp:
    """Returns a ClientApp that hands every message to the site of its node.

    No exception leaves it, since its text would reach the server.
    """
    client_app = ClientApp()

    @client_app.query()
    def ask(message: Message, context: Context) -> Message:
        try:
            answer = site_of(context).answer(read_payload(message.content))
        except DrencoderError as error:
            print(f"drencoder: {one_line(error)}", file=sys.stderr)
            answer = refusal_frame(Refusal.FAILED)
        except Exception as error:
            report_crash(error)
            answer = refusal_frame(Refusal.FAILED)
        return Message(wrap_payload(answer), reply_to=message)

    return client_app


def open_site(
    recipe: str | None,
    clients: str,
    *,
    data: str | None,
    state: str | Path,
    min_noise: float = 0.0,
    key: Path | None = None,
    roster: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Site:
    """Loads a site: base model, its clients' text, its ledger in the folder `state`. Secure aggregation needs its private `key`
    and takes the nodes' public keys from `roster` (default: the file of that name beside the key).

    Raises:
      DrencoderError: any of them cannot be had.
    """
    config = load_recipe(recipe)
    if not config.federation.population:
        raise RecipeError("federation.population is not in the recipe: a site must know it; set it on every side.")
    client_set = ClientSet.parse(clients, config.federation.population)
    session = SecAggSession.open(config, key, roster) if is_secure(config) else None
    components = _load_components(
        config.to_toml(), recipe, None if data is None else SiteText(data, client_set.clients)
    )
    said = config if data is None else config.changed({"data.source": data})
    # On this site's own screen: counts of its text stay here.
    for sentence in [*unused_knobs(said).values(), *components.texts.report(0)]:
        say(sentence)
    ledger = SiteLedger.open(Path(state) / "site.jsonl", agreement(config).hex(), components.plan)
    return Site(components, client_set, ledger, min_noise=min_noise, session=session, say=say)


@lru_cache(maxsize=1)
def _load_components(resolved: str, recipe: str | None, own: SiteText | None) -> Components:
    """Builds what a site computes with, once for all the sites that a process simulates.

    `resolved` is the recipe's text: it is part of the cache's key, so that a changed file is read again.
    """
    return build_site(load_recipe(recipe), own)


_SITES: dict[tuple[str, ...], Site] = {}


def _site_of_node(context: Context) -> Site:
    """Returns the site of a node by the node's configuration, loaded once in a process. Raises DrencoderError."""
    settings = context.node_config
    shared = "partition-id" in settings and "num-partitions" in settings
    clients = str(settings.get("clients", f"{settings['partition-id']}/{settings['num-partitions']}" if shared else ""))
    if not clients or "state" not in settings:
        raise RecipeError(
            'the node\'s configuration lacks clients or state: start it with --node-config \'clients="0-9" state="FOLDER"\'.'
        )
    recipe, data = settings.get("recipe"), settings.get("data")
    key = (str(recipe), clients, str(data), str(settings["state"]))
    if key not in _SITES:
        _SITES[key] = open_site(
            None if recipe is None else str(recipe), clients, data=None if data is None else str(data),
            state=str(settings["state"]), min_noise=float(settings.get("min-noise", 0.0)),
        )  # fmt: skip
    return _SITES[key]


app = make_client_app(_site_of_node)
