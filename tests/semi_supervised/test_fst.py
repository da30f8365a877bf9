import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks import EMATeacher
from zoo import FST, DeFixMatch, FixMatch, MeanTeacher, Supervised
from zoo.core.errors import UserError
from zoo.core.method import Method
from zoo.policies import MovingAlignment, Threshold

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "fst.json").read_text())


class Small(nn.Sequential):
    """With BatchNorm, in 64 bits."""

    def __init__(self, num_outputs: int, norm: bool = True) -> None:
        middle = nn.BatchNorm1d(8) if norm else nn.LayerNorm(8)
        super().__init__(nn.Linear(3, 8, bias=False), middle, nn.Tanh(), nn.Linear(8, num_outputs))
        self.double()


SGD = partial(torch.optim.SGD, lr=0.3)
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
ADAMW = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
POLICY = partial(Threshold, threshold=0.3, soft=True, alignment=partial(MovingAlignment, momentum=0.5))
MEAN_TEACHER = partial(MeanTeacher, unlabeled_weight=5.0, ramp=0.0, momentum=0.8)
FIXMATCH = partial(FixMatch, labeler="teacher", policy=POLICY, momentum=0.8)
METHODS = pytest.mark.parametrize("recipe", [MEAN_TEACHER, FIXMATCH], ids=["MeanTeacher", "FixMatch"])


def batches(count: int, rows: int = 8) -> list[dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        {
            "labeled": {"image": draw(rows, 3), "label": torch.randint(4, (rows,), generator=generator)},
            "unlabeled": {name: draw(2 * rows, 3) for name in ("weak", "weak_2", "strong")},
        }
        for _ in range(count)
    ]


def build(cls: Any, seed: int = 0, **arguments: Any) -> Any:
    method = cls(**{"network": Small, "num_classes": 4, "optimizer": MOMENTUM, **arguments})
    torch.manual_seed(seed)
    method.configure_model()
    return method.double()


def trainer(steps: int, *callbacks: Callback, **arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[EMATeacher(), *callbacks], **arguments,
    )  # fmt: skip


def fit(method: Method, data: list[Any], *callbacks: Callback, **arguments: Any) -> Trainer:
    run = trainer(len(data), *callbacks, **arguments)
    run.fit(method, DataLoader(copy.deepcopy(data), batch_size=None))
    return run


def same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    theirs = b.state_dict()
    assert list(a.state_dict()) == list(theirs)
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=name)


def total(method: Any, batch: Any) -> Tensor:
    outputs = method.student(batch)
    return sum(method.losses(batch, outputs, method.targets(batch, outputs)).values())


def naive(method: Any, optimizer: Any, data: list[Any], steps: int, clip: float | None = None) -> None:
    """What FST should be, by copies of everything and a forward pass for every step."""
    for batch in data:
        twin, twin_optimizer = copy.deepcopy((method, optimizer))
        twin.teacher = method.teacher
        for _ in range(steps):
            twin_optimizer.zero_grad()
            total(twin, batch).backward()
            if clip:
                nn.utils.clip_grad_norm_(twin.network.parameters(), clip)
            twin_optimizer.step()
            for mine, theirs in zip(method.teacher.module.parameters(), twin.network.parameters(), strict=True):
                mine.data.lerp_(theirs.data, 0.2)
        optimizer.zero_grad()
        total(method, batch).backward()
        if clip:
            nn.utils.clip_grad_norm_(method.network.parameters(), clip)
        optimizer.step()
        for mine, theirs in zip(method.teacher.module.parameters(), method.network.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.2)
        for mine, theirs in zip(method.teacher.module.buffers(), method.network.buffers(), strict=True):
            mine.copy_(theirs)
        method.teacher.updates += 1


def without_warmup(recipe: Any) -> Any:
    return partial(recipe, warmup=False) if recipe is MEAN_TEACHER else recipe


@METHODS
@pytest.mark.parametrize("mode", ["deep", "wide"])
def test_no_steps_are_the_inner_method_bit_for_bit(recipe, mode) -> None:
    wrapped, plain = build(FST, method=recipe, steps=0, mode=mode), build(recipe)
    for method in (wrapped, plain):
        fit(method, batches(3))
    same(wrapped, plain)


@METHODS
@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAMW], ids=["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("steps", [1, 3])
def test_deep_steps_are_those_of_copies(recipe, optimizer, steps) -> None:
    recipe = without_warmup(recipe)
    wrapped = build(FST, method=recipe, steps=steps, optimizer=optimizer)
    plain = build(recipe, optimizer=optimizer)
    fit(wrapped, batches(3))
    naive(plain, optimizer(plain.parameter_groups()), batches(3), steps)
    same(wrapped, plain, tolerance=1e-10)


def test_one_deep_step_needs_one_forward_pass_of_the_student() -> None:
    calls = []

    class Counting(Small):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                calls.append(len(x))
            return super().forward(x)

    for steps, passes in ((1, 2), (3, 6)):
        calls.clear()
        fit(build(FST, method=MEAN_TEACHER, steps=steps, network=Counting), batches(2))
        assert len(calls) == passes


def test_clipping_and_rates_by_group_hold_in_virtual_steps() -> None:
    arguments = {"optimizer": ADAMW, "lr_multipliers": {"network.0": 0.1}}
    recipe = without_warmup(MEAN_TEACHER)
    wrapped, plain = build(FST, method=recipe, steps=2, **arguments), build(recipe, **arguments)
    fit(wrapped, batches(3), gradient_clip_val=0.05)
    optimizer = plain.configure_optimizers()
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.005, 0.05])
    naive(plain, optimizer, batches(3), 2, clip=0.05)
    same(wrapped, plain, tolerance=1e-10)


@METHODS
def test_with_rate_zero_the_teacher_moves_further_to_where_the_student_is(recipe) -> None:
    recipe = without_warmup(recipe)
    wrapped, plain = build(FST, method=recipe, steps=3, virtual_lr=0.0), build(recipe)
    for method in (wrapped, plain):  # student and average are apart
        for p in method.network.parameters():
            p.data.mul_(1.5)
    plain.teacher.module.load_state_dict(copy.deepcopy(plain.teacher.module.state_dict()))
    for _ in range(3):
        plain.teacher.approach(list(plain.network.parameters()))
    for method in (wrapped, plain):
        fit(method, batches(1))
    same(wrapped, plain, tolerance=1e-12)


class Snapshot(Callback):
    """What there is before a step and between its virtual and its real part."""

    def __init__(self, method: FST) -> None:
        self.pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.method, learn = method, method.method.learn

        def watching(*arguments: Any) -> Tensor:
            self.pairs.append((self.before, self.now()))
            return learn(*arguments)

        method.method.learn = watching

    def now(self) -> dict[str, Any]:
        method = self.method
        state = {name: value for name, value in method.state_dict().items() if not name.startswith("teacher")}
        gradients = [None if p.grad is None else p.grad.clone() for p in method.method.network.parameters()]
        found = {"state": state, "gradients": gradients, "optimizer": method.optimizer.state_dict()}
        return copy.deepcopy(found)

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = self.now()


@METHODS
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW], ids=["momentum", "adamw"])
@pytest.mark.parametrize(("mode", "steps"), [("deep", 1), ("deep", 3), ("wide", 3)])
def test_virtual_steps_leave_nothing_but_the_teacher_behind(recipe, optimizer, mode, steps) -> None:
    method = build(FST, method=recipe, mode=mode, steps=steps, optimizer=optimizer)
    teacher = copy.deepcopy(method.method.teacher.module)
    snapshot = Snapshot(method)
    parameters = dict(method.method.network.named_parameters())
    fit(method, batches(2), snapshot)
    assert len(snapshot.pairs) == 2
    learned = {f"network.{name}" for name in parameters}
    for before, after in snapshot.pairs:
        assert str(before["optimizer"]) == str(after["optimizer"])
        assert str(before["gradients"]) == str(after["gradients"])
        for name, value in before["state"].items():
            # The real forward pass moves running statistics, and the real targets move the policy.
            if name in learned or not name.startswith(("network", "policy")):
                assert torch.equal(value, after["state"][name]), name
    assert {name: id(p) for name, p in parameters.items()} == {
        name: id(p) for name, p in method.method.network.named_parameters()
    }
    assert any(
        not torch.equal(p, q)
        for p, q in zip(teacher.parameters(), method.method.teacher.module.parameters(), strict=True)
    )


@METHODS
@pytest.mark.parametrize(("mode", "steps"), [("deep", 1), ("deep", 3), ("wide", 3)])
def test_buffers_move_once_a_step(recipe, mode, steps) -> None:
    """With a teacher that never moves virtually, network and policy see what they see without virtual steps."""
    recipe = partial(without_warmup(recipe), momentum=1.0)
    data = batches(1)
    wrapped = build(FST, method=recipe, mode=mode, steps=steps)
    fit(wrapped, data)
    if mode == "wide":
        data = [{role: {k: v[:: steps + 1] for k, v in part.items()} for role, part in data[0].items()}]
    plain = build(recipe)
    fit(plain, data)
    same(wrapped, plain)


def test_wide_under_sgd_is_one_step_along_the_mean_gradient() -> None:
    recipe = without_warmup(MEAN_TEACHER)
    data = batches(1)[0]
    wrapped, plain = (build(c, optimizer=SGD, network=partial(Small, norm=False), **a) for c, a in (
        (FST, {"method": recipe, "steps": 3, "mode": "wide"}), (recipe, {}),
    ))  # fmt: skip
    parts = [{role: {k: v[i::4] for k, v in part.items()} for role, part in data.items()} for i in range(4)]
    optimizer = SGD(plain.parameter_groups())
    parameters = list(plain.network.parameters())
    gradients = [torch.autograd.grad(total(plain, part), parameters) for part in parts[1:]]
    ahead = [p - 0.3 * sum(g) / 3 for p, *g in zip(parameters, *gradients, strict=True)]
    plain.teacher.approach([p.detach() for p in ahead])
    total(plain, parts[0]).backward()
    optimizer.step()
    plain.teacher.update(plain.network)
    fit(wrapped, [data])
    same(wrapped, plain, tolerance=1e-12)


class Two(nn.Module):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(GOLDEN["inputs"]["start"], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Toy(MeanTeacher):
    """The golden figures' loss."""

    def student(self, batch: Any) -> tuple[Tensor, ...]:
        return self.network(batch["labeled"]["x"]), self.network(batch["unlabeled"]["u"])

    def targets(self, batch: Any, outputs: Any) -> tuple[Tensor, Tensor]:
        said = self.teacher(batch["unlabeled"]["v"]).tanh()
        return said, torch.ones_like(said)

    def losses(self, batch: Any, outputs: Any, targets: Any) -> dict[str, Tensor]:
        fitted, agreed = (outputs[0] - batch["labeled"]["y"]) ** 2, (outputs[1].tanh() - targets[0]) ** 2
        return {"supervised": fitted.mean(), "consistency": 0.5 * agreed.mean()}

    def watch(self, *_: Any) -> None:
        TEACHERS.append(self.teacher.module.weight.tolist())


TEACHERS: list[Any] = []
KINDS = {"sgd": torch.optim.SGD, "momentum": torch.optim.SGD, "adamw": torch.optim.AdamW}


class Follow(Callback):
    def __init__(self) -> None:
        self.students: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.students.append(pl_module.network.weight.tolist())


def golden_batches(mode: str) -> list[Any]:
    found = []
    for step in GOLDEN["inputs"]["batches"]:
        parts = [{k: torch.tensor(v, dtype=torch.float64) for k, v in b.items()} for b in step]
        if mode == "deep":
            whole = parts[0]
        else:  # so that every fourth row is the same part's
            whole = {k: torch.stack([part[k] for part in parts], 1).flatten(0, 1) for k in parts[0]}
        found.append({"labeled": {k: whole[k] for k in "xy"}, "unlabeled": {k: whole[k] for k in "uv"}})
    return found


@pytest.mark.parametrize("mode", ["deep", "wide"])
@pytest.mark.parametrize(("name", "restore"), [("sgd", True), ("sgd", False), ("momentum", False), ("adamw", False)])
def test_the_authors_updates_in_their_order(mode, name, restore) -> None:
    inputs = GOLDEN["inputs"]
    recipe, optimizer = partial(Toy, momentum=inputs["momentum"], warmup=False), inputs["optimizers"][name]
    method = build(
        FST, method=recipe, network=Two, mode=mode, steps=inputs["steps"], restore=restore,
        optimizer=partial(KINDS[name], **optimizer), decay_norms_and_biases=True,
    )  # fmt: skip
    TEACHERS.clear()
    fit(method, golden_batches(mode), follow := Follow())
    expected = GOLDEN["outputs"][f"{mode}_{name}"]
    assert follow.students == [pytest.approx(row["student"], abs=1e-8) for row in expected]
    assert [pytest.approx(row["teacher_of_the_real_step"], abs=1e-8) for row in expected] == TEACHERS


def test_restoring_makes_a_difference_for_optimizers_with_a_memory() -> None:
    found = []
    for restore in (True, False):
        method = build(FST, method=MEAN_TEACHER, optimizer=ADAMW, restore=restore)
        run = fit(method, batches(2))
        found.append((method, run.optimizers[0]))
    steps = [next(iter(optimizer.state.values()))["step"].item() for _, optimizer in found]
    counts = [int(method.method.network[1].num_batches_tracked) for method, _ in found]
    assert steps == [2, 8]  # K + 1 = 4 a step
    assert counts == [2, 8]
    assert not torch.equal(*(method.method.network[0].weight for method, _ in found))


def test_the_teacher_and_the_schedule_count_real_steps() -> None:
    schedule = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=10)
    method = build(FST, method=MEAN_TEACHER, scheduler=schedule)
    run = fit(method, batches(4))
    assert run.global_step == 4
    assert int(method.method.teacher.updates) == 4
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 4
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.06)


def test_the_wrapper_is_the_inner_method_to_everybody_else(tmp_path) -> None:
    method = build(FST, method=partial(MeanTeacher, momentum=0.8), optimizer=torch.optim.SGD, network=Small)
    inner = method.method
    assert (method.labeled_views, method.unlabeled_views) == (("image",), ("weak", "weak_2"))
    assert method.predictor is inner.teacher
    assert [pair[0] for pair in method.teacher_pairs] == [inner.teacher]
    assert method.network is inner.network
    assert isinstance(method.baseline(), Supervised)
    assert inner.hparams["_class_path"] == "zoo.MeanTeacher"
    x = torch.randn(3, 3, dtype=torch.float64)
    assert torch.equal(method(x), inner.teacher(x))

    run = fit(method, batches(1))
    run.save_checkpoint(tmp_path / "fst.ckpt")
    state = torch.load(tmp_path / "fst.ckpt", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in state} == {"network", "teacher"}
    plain = build(MeanTeacher, seed=1)
    plain.load_state_dict(state)
    same(plain, method)
    loaded = Method.load_from_checkpoint(tmp_path / "fst.ckpt", network=Small, num_classes=4).double()
    assert isinstance(loaded, FST)
    assert isinstance(loaded.method, MeanTeacher)
    assert loaded.method.momentum == 0.8
    loaded.load_state_dict(state)
    same(loaded, method)


def test_targets_are_watched_and_terms_logged_once_a_step() -> None:
    method = build(FST, method=FIXMATCH, steps=2)
    data = [
        {**b, "unlabeled": {**b["unlabeled"], "hidden_label": torch.zeros(16, dtype=torch.long)}} for b in batches(3)
    ]

    class Watch(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.watched = self.seen = []

    run = fit(method, data, watch := Watch(), log_every_n_steps=1)
    assert len(watch.seen) == 3
    names = {"loss", "supervised", "unlabeled", "utilization", "pseudo_label_accuracy"}
    assert {f"train/{name}" for name in names} <= set(run.callback_metrics)


def on_two_ranks(mode: str, recipe: Any, folder: Path) -> tuple[Method, Method]:
    network = partial(Small, norm=False)
    data, results = batches(2), []
    for ranks in (1, 2):
        method = build(FST, method=recipe, steps=3 if mode == "wide" else 2, mode=mode, network=network)
        arguments = {"devices": ranks, "strategy": "ddp_fork"} if ranks == 2 else {"devices": 1}
        run = Trainer(
            accelerator="cpu", max_steps=2, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            gradient_clip_val=0.5, default_root_dir=folder, callbacks=[EMATeacher()], **arguments,
        )  # fmt: skip
        run.fit(method, Share(data, ranks))
        results.append(method)
    return results[0], results[1]


class Share(DataLoader):
    def __init__(self, data: list[Any], ranks: int) -> None:
        super().__init__(range(len(data)), batch_size=None)
        self.data, self.ranks = data, ranks

    def __iter__(self):
        rank = torch.distributed.get_rank() if self.ranks > 1 else 0
        for batch in self.data:
            yield {r: {k: v.chunk(self.ranks)[rank].clone() for k, v in d.items()} for r, d in batch.items()}


@pytest.mark.parametrize(("mode", "recipe"), [("deep", FIXMATCH), ("wide", MEAN_TEACHER)])
def test_two_ranks_are_one_on_the_joint_batch(mode, recipe, tmp_path) -> None:
    one, two = on_two_ranks(mode, recipe, tmp_path)
    same(one, two, tolerance=1e-6)  # the policy computes in 32 bits


def test_what_virtual_steps_cannot_follow_is_refused() -> None:
    for arguments, word in (
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        ({"precision": "16-true"}, "precision=16-true"),
    ):
        with pytest.raises(UserError, match=word):
            fit(build(FST, method=MEAN_TEACHER), batches(2), **arguments)
        method = build(FST, method=MEAN_TEACHER, steps=0)
        method.trainer = trainer(1, **arguments)
        method.setup("fit")
    with pytest.raises(UserError, match="got Foreign"):
        fit(build(FST, method=MEAN_TEACHER, optimizer=partial(Foreign, lr=0.1)), batches(1))
    with pytest.raises(UserError, match="deals 8 samples out to 3 parts"):
        fit(build(FST, method=MEAN_TEACHER, mode="wide", steps=2), batches(1))


class Foreign(torch.optim.SGD):
    """An optimizer that is not torch's own."""


class Stepped(MeanTeacher):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.report(nothing=torch.zeros(()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"mode": "wild"}, "Did you mean 'wide'"),
        ({"virtual_lr": -0.1}, "virtual_lr=-0.1"),
        ({"method": FixMatch}, "labeler: teacher"),
        ({"method": Supervised}, r"it has no student\(\)"),
        ({"method": DeFixMatch}, "is its own"),
        ({"method": Stepped}, "is its own"),
    ],
)
def test_bad_arguments(arguments, words) -> None:
    with pytest.raises(UserError, match=words):
        FST(**{"method": MeanTeacher, "network": Small, "num_classes": 4, **arguments})


def test_bfloat16_virtual_steps_are_near_those_in_32_bits() -> None:
    data = [
        {role: {k: v.float() if v.is_floating_point() else v for k, v in part.items()} for role, part in b.items()}
        for b in batches(2)
    ]
    found = []
    for precision in ("32-true", "bf16-mixed"):
        method = build(FST, method=MEAN_TEACHER, steps=2, optimizer=SGD).float()
        fit(method, data, precision=precision)
        found.append(method)
    same(found[0], found[1], tolerance=0.1)
    assert not torch.equal(found[0].network[0].weight, found[1].network[0].weight)
