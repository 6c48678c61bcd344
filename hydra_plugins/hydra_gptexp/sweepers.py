"""hydra/sweeper=grid and hydra/sweeper=optuna."""

from dataclasses import asdict

from hydra.core.config_store import ConfigStore

from gptexp.sweeps import optuna, search, seeds


class GridSweeper(seeds.DecidingGrid):
    """Every combination of the values."""


class OptunaSweeper(optuna.OptunaSearch):
    """A search by Optuna."""


for name, sweeper, defaults in (("grid", GridSweeper, {}), ("optuna", OptunaSweeper, asdict(search.SearchConfig()))):
    node = {"_target_": f"{__name__}.{sweeper.__name__}", "params": None, **defaults}
    ConfigStore.instance().store(group="hydra/sweeper", name=name, node=node, provider="gptexp")
