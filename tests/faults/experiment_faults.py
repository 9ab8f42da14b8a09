"""Faults in the long runs: what would make a race unfair, or its record wrong."""

from __future__ import annotations

from tests.faults.fault import Fault, replace


def _fault(name: str, module: str, old: str, new: str, test: str = "training") -> Fault:
    put = replace(f"experiments/{module}.py", old, new)
    return Fault(name, put, (f"tests/lib/test_{test}.py",))


EXPERIMENT_FAULTS = [
    _fault("steps of KFAC are not clipped", "methods", 'kl_clip=setting["clip"]', "kl_clip=None"),
    _fault("steps of GGN are not clipped", "methods", "scale * direction", "direction"),
    _fault("GGN without damping", "methods", "added(quadratic.product(v), v, delta)",
           "quadratic.product(v)"),
    _fault("KFAC has another damping than it was given", "methods",
           'damping=Exact(setting["delta"])', "damping=Exact(1e-3)"),
    _fault("decays are drawn by themselves", "methods", "return round(1 - super().at(u), 6)",
           "return round(super().at(u), 6)"),
    _fault("ranges are uniform, not log-uniform", "methods",
           "self.low * (self.high / self.low) ** u", "self.low + (self.high - self.low) * u"),
    _fault("every method has luck of its own", "methods", 'f"{task.name}/{trial}/{name}"',
           'f"{task.name}/{trial}/{name}/{self.name}"'),
    _fault("momentum of SGD is not passed on", "methods",
           'lr=setting["lr"], momentum=setting["momentum"]', 'lr=setting["lr"]'),
    _fault("time includes what is recorded", "race", "spent += time.process_time() - begun",
           "spent = time.process_time()"),
    _fault("an error ends a run quietly", "race", "if record(number + 1):\n                raise",
           "record(number + 1)"),
    _fault("a run that explodes goes on", "race", "given_up = not train <= GIVEN_UP * first",
           "given_up = False"),
    _fault("batches in the same order for every seed", "race", "len(on.X)), seed)",
           "len(on.X)), 0)"),
    _fault("the held-out loss is that of training", "race",
           "held_out, wrong = evaluated(task, net, off)",
           "held_out, wrong = evaluated(task, net, on)"),
    _fault("the transformer sees the next character", "tasks", ".triu(1)", ".triu(2)"),
    _fault("held-out windows are trained on", "tasks", "Data(X[~tenth], y[~tenth])",
           "Data(X, y)"),
    _fault("targets are the characters themselves", "tasks", "tokens[1 : whole + 1]",
           "tokens[:whole]"),
    _fault("a pass counts as long for every batch size", "tuning",
           'step * setting["batch"] / data', "step / data"),
    _fault("a run that was given up counts by its last loss", "tuning",
           'return float("inf") if within[-1] is None else within[-1]',
           "return next(loss for loss in reversed(within) if loss is not None)"),
    _fault("the best trial by steps looks beyond the horizon", "tuning",
           'if at <= horizon(task, axis) or axis == "seconds"', "if True"),
    _fault("gradients count as kept", "finals", "held - gradients", "held"),
    _fault("a search that is not finished is good enough", "finals", "if lacking:", "if False:"),
    _fault("what was computed is computed again", "store", "if cell.key not in store]", "]",
           "experiments"),
    _fault("results of other settings are mixed", "store",
           'if found["settings"] != self.settings:', "if False:", "experiments"),
    _fault("a file that is written in place", "store",
           'unfinished = self.path.with_suffix(".unfinished")', "unfinished = self.path",
           "experiments"),
]  # fmt: skip
