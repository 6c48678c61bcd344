"""A grid that adds seeds where they are needed: `sweep.seeds=auto`."""

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import Override

from gptexp.config.composition import each
from gptexp.errors import UserError
from gptexp.sweeps.grid import Grid, Job, distinct, report
from gptexp.sweeps.sweep import Sweep

if TYPE_CHECKING:
    from gptexp.analysis.study import Study

log = logging.getLogger("gptexp")


class DecidingGrid(Grid):
    """A grid whose seeds may be left to it."""

    def until_decided(self, sweep: Sweep, overrides: Sequence[Override]) -> list[float]:
        """Train a few seeds of every variant, and further ones of those that are not decided, as `looks.plan` says.

        The variants are compared with the first one, by the final loss, as `gptexp.compare` does.

        Returns:
            the lowest validation loss of each job.

        Raises:
            UserError: for seeds that are named, too.
            RunFailed: when a job failed.
        """
        from gptexp.analysis.collect import collect  # here, because pandas and scipy are slow to import
        from gptexp.analysis.looks import describe, plan
        from gptexp.analysis.study import build_study, label_of

        first = int(self.config.seed)
        for override in (o for o in overrides if o.key_or_group == "seed"):
            line = str(override.input_line)
            if line.partition("=")[2] == str(self.params.get("seed")):
                continue  # the sweep's file names seeds for those who do not ask for this
            if override.is_sweep_override():
                raise UserError(f"{line}: sweep.seeds=auto chooses the seeds; leave it out, or give the first alone")
            first = int(str(override.value()))
        others = [o for o in overrides if o.key_or_group != "seed"]
        looks = plan(first, int(self.config.sweep.max_seeds))
        stored = {"seeds": list(looks.seeds), "counts": list(looks.counts)}
        varied = [*(o.get_key_element() for o in others if o.is_sweep_override()), "seed"]
        combinations = [list(values) for values in itertools.product(*map(each, others))]
        jobs: dict[tuple[int, int], Job] = {}
        open_, note = list(range(len(combinations))), ""
        for look in range(len(looks.counts)):
            for number, seed in itertools.product(open_, looks.at(look)):
                if (number, seed) not in jobs:
                    jobs[number, seed] = self.prepare([*combinations[number], f"seed={seed}"], varied)
            self.finish(sweep, distinct(jobs.values()), varied, stored, note)
            study = build_study(collect([sweep.folder]))
            if study.standing is None or study.standing.look < look:  # too many runs have failed
                break
            undecided = {study.variants[row].label for row in study.standing.open}
            note = f"{describe(looks, look)}: {_decided(study, undecided)}"
            log.info("%s", note)
            wanted = {r.path.name for r in study.records if label_of(study, r) in {*undecided, study.baseline}}
            open_ = [number for number in open_ if any(jobs[number, s].name in wanted for s in looks.at(look))]
            if not undecided:
                break
        return report(sweep, distinct(jobs.values()))


def _decided(study: "Study", undecided: set[str]) -> str:
    """What is decided, what is given up and what is open."""
    from gptexp.analysis.summary import VERDICTS

    verdicts = [(c.this, c.judgement.verdict) for c in study.comparisons if c.kind == "variant"]
    parts = [f"{name} is {VERDICTS[verdict]}" for name, verdict in verdicts if verdict != "undecided"]
    given_up = [name for name, verdict in verdicts if verdict == "undecided" and name not in undecided]
    parts += [f"{name} is unlikely to be decided" for name in given_up]
    parts += [f"open: {', '.join(name for name, _ in verdicts if name in undecided)}"] if undecided else []
    return "; ".join(parts) or "nothing to compare"
