import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.losses import gradient_variances, irm_penalty, pairwise_coral, pairwise_mmd, risk_variance, variance_distance

S, N = 3, 4
NETWORK = partial(Network, backbone="lenet", in_channels=1)
SGD = partial(torch.optim.SGD, lr=0.1)


def batch(seed: int = 1, domains: int = S) -> dict:
    generator = torch.Generator().manual_seed(seed)
    domain = torch.arange(domains).repeat_interleave(N)
    image = torch.randn(domains * N, 1, 28, 28, generator=generator, dtype=torch.float64)
    label = torch.randint(3, (domains * N,), generator=generator)
    return {"source": {"image": image + 0.5 * domain.view(-1, 1, 1, 1), "label": label, "domain": domain}}


def method(name: str, step: int | None = None, network: partial = NETWORK, **arguments):
    torch.manual_seed(0)
    made = getattr(zoo, name)(
        network=network, num_classes=3, optimizer=SGD, num_domains=arguments.pop("num_domains", S), **arguments
    )
    made.configure_model()
    if step is not None:
        made._trainer = SimpleNamespace(global_step=step, estimated_stepping_batches=1000, training=False)
    return made.double()


def gradients(made, b=None) -> list[torch.Tensor]:
    made.zero_grad()
    made.training_step(b or batch(), 0).backward()
    return [p.grad.clone() for p in made.network.parameters()]


def same(a: list, b: list, atol: float = 1e-12) -> bool:
    return all(torch.allclose(x, y, atol=atol) for x, y in zip(a, b, strict=True))


def loop_risks(made, b) -> list[torch.Tensor]:
    source = b["source"]
    return [
        F.cross_entropy(made.network(source["image"][s * N : s * N + N]), source["label"][s * N : s * N + N])
        for s in range(S)
    ]


# --- a weight of 0 is ERM, bit for bit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("IRM", {"penalty_weight": 0, "early_weight": 0}),
        ("VREx", {"penalty_weight": 0, "early_weight": 0}),
        ("Fishr", {"penalty_weight": 0}),
        ("GroupDRO", {"rate": 0.0}),
        ("CORALGeneralization", {"penalty_weight": 0.0}),
        ("MMDGeneralization", {"penalty_weight": 0.0}),
        ("SharpnessAwareERM", {"rho": 0.0}),
        ("DomainAdversarialGeneralization", {"domain_weight": 0.0}),
        ("DomainAdversarialGeneralization", {"reversal": 0.0, "conditional": True}),
        ("MixStyle", {"layers": ["stages.0"], "probability": 0.0}),
        ("InterDomainMixup", {"alpha": 0.0}),
    ],
)
def test_weight_zero_is_erm(name, arguments) -> None:
    trained = []
    for made in (method(name, **arguments), method("ERM")):
        optimizer = SGD(made.parameters())
        for seed in range(3):
            optimizer.zero_grad()
            made.training_step(batch(seed), 0).backward()
            optimizer.step()
        trained.append(list(made.network.parameters()))
    exact = name not in ("InterDomainMixup", "GroupDRO")  # those average in another order
    assert all(torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-7) for a, b in zip(*trained, strict=True))


def test_what_is_random_afterwards_does_not_depend_on_the_classifier_of_domains() -> None:
    method("DomainAdversarialGeneralization", conditional=True)
    ours = torch.rand(3)
    method("ERM")
    assert torch.equal(ours, torch.rand(3))


# --- ERM, penalties ---------------------------------------------------------------------------------------------------


def test_erm_is_the_mean_over_the_batch_and_over_domains_of_unequal_size() -> None:
    made, b = method("ERM"), batch()
    source = b["source"]
    loss = made.training_step(b, 0)
    assert loss.item() == pytest.approx(
        F.cross_entropy(made.network(source["image"]), source["label"]).item(), abs=1e-12
    )
    less = {"source": {key: value[3:] for key, value in source.items()}}
    risks = [F.cross_entropy(made.network(x), y) for x, y in (
        (source["image"][3:4], source["label"][3:4]), (source["image"][4:8], source["label"][4:8]),
        (source["image"][8:], source["label"][8:]))]  # fmt: skip
    assert made.training_step(less, 0).item() == pytest.approx((sum(risks) / 3).item(), abs=1e-12)
    absent = {"source": {key: value[4:] for key, value in source.items()}}
    assert made.training_step(absent, 0).item() == pytest.approx((sum(risks[1:]) / 2).item(), abs=1e-12)


@pytest.mark.parametrize("name", ["IRM", "VREx", "Fishr", "CORALGeneralization", "MMDGeneralization"])
def test_loss_is_risk_plus_weighted_penalty(name) -> None:
    made, b = method(name, step=10**6, penalty_weight=7.0), batch()
    source = b["source"]
    features = made.network.features(source["image"])
    logits = made.network.logits(features)
    y, d = source["label"], source["domain"]
    if name == "IRM":
        penalty = irm_penalty(logits, y, d, S)[0].mean()
    elif name == "VREx":
        penalty = risk_variance(torch.stack(loop_risks(made, b)), torch.ones(S))
    elif name == "Fishr":
        penalty = variance_distance(*gradient_variances(features, logits, y, d, S))
    else:
        penalty = (pairwise_coral if name[0] == "C" else pairwise_mmd)(features, d, S)
    risk = sum(loop_risks(made, b)) / S
    assert abs(penalty.item()) > 1e-9
    assert made.training_step(b, 0).item() == pytest.approx((risk + 7.0 * penalty).item(), rel=1e-7)


def test_the_weight_jumps_at_its_step_and_not_before() -> None:
    for name, early in (("IRM", 1.0), ("VREx", 1.0), ("Fishr", 0.0)):
        made = method(name, step=0, penalty_weight=50.0, annealing_steps=10)
        weights = []
        for step in (0, 9, 10, 11):
            made._trainer.global_step = step
            weights.append(made.weight)
        assert weights == [early, early, 50.0, 50.0]
        made._trainer = None
        assert made.weight == early


def test_rescaling_divides_the_whole_loss_where_the_weight_is_above_one() -> None:
    losses = [
        [
            method("VREx", step, penalty_weight=20.0, annealing_steps=5, rescale=on).training_step(batch(), 0).item()
            for step in (0, 5)
        ]
        for on in (False, True)
    ]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] == pytest.approx(20 * losses[1][1], rel=1e-9)


def test_moments_are_forgotten_at_the_jump_alone() -> None:
    for reset in (True, False):
        made = method("IRM", step=0, annealing_steps=3, reset_optimizer=reset)
        optimizer = torch.optim.Adam(made.parameters())
        made.optimizers = lambda use_pl_optimizer, optimizer=optimizer: optimizer
        made._trainer.current_epoch = 0
        made._trainer.global_rank = 0
        known = []
        for step in range(5):
            made._trainer.global_step = step
            made.on_train_batch_start(None, step)
            known.append(len(optimizer.state) > 0)
            optimizer.zero_grad()
            made.training_step(batch(), 0).backward()
            optimizer.step()
        assert known == [False, True, True, not reset, True]


def test_fishr_averages() -> None:
    """The average carries no gradient of earlier steps, and the newest weighs as if there were no average."""
    made = method("Fishr", step=10**6, momentum=0.8, penalty_weight=1.0)
    found = []
    for seed in range(3):
        source = batch(seed)["source"]
        features = made.network.features(source["image"])
        found.append(
            gradient_variances(features, made.network.logits(features), source["label"], source["domain"], S)[0]
        )
        loss = made.training_step(batch(seed), 0)
    ema = torch.zeros_like(found[0])
    for v in found:
        ema = 0.8 * ema.detach() + 0.2 * v
    assert torch.allclose(made.variances, ema, rtol=1e-6)
    penalty = variance_distance(ema / 0.2, torch.ones(S))
    assert loss.item() - penalty.item() == pytest.approx((sum(loop_risks(made, batch(2))) / S).item(), rel=1e-7)
    before = made.variances.clone()
    made.eval()
    made.training_step(batch(5), 0)
    assert torch.equal(before, made.variances)
    absent = {"source": {key: value[N:] for key, value in batch(6)["source"].items()}}
    made.train()
    loss = made.training_step(absent, 0)
    assert torch.isfinite(loss)
    assert torch.equal(before[0], made.variances[0])
    assert not torch.equal(before[1], made.variances[1])


def test_fishr_takes_the_gradients_of_the_head_behind_dropout() -> None:
    made, source = method("Fishr", step=10**6, penalty_weight=1.0), batch()["source"]
    made.network.dropout = torch.nn.Tanh()  # stands for what is random
    features = made.network.features(source["image"]).tanh()
    logits = made.network.head(features)
    penalty = variance_distance(*gradient_variances(features, logits, source["label"], source["domain"], S))
    wanted = F.cross_entropy(logits, source["label"]) + penalty
    assert made.training_step(batch(), 0).item() == pytest.approx(wanted.item(), rel=1e-7)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ERM", {}),
        ("IRM", {"estimator": "squared"}),
        ("VREx", {}),
        ("Fishr", {}),
        ("GroupDRO", {"rate": 0.5}),
        ("CORALGeneralization", {}),
        ("MMDGeneralization", {}),
        ("SharpnessAwareERM", {"rho": 0.5}),
        ("DomainAdversarialGeneralization", {"conditional": True}),
    ],
)
def test_two_ranks_are_one_also_where_one_lacks_a_domain(name, arguments, on_ranks) -> None:
    def run(rows: slice) -> list[torch.Tensor]:
        made = method(name, step=10**6, **arguments)
        made.training_step({"source": {key: value[rows] for key, value in batch()["source"].items()}}, 0).backward()
        return [p.grad for p in made.parameters()]

    halves = on_ranks(lambda rank: run(slice(6 * rank, 6 * rank + 6)))  # domains 0 0 0 0 1 1 and 1 1 2 2 2 2
    for ours, theirs, joint in zip(*halves, run(slice(12)), strict=True):
        assert torch.allclose((ours + theirs) / 2, joint, rtol=1e-6, atol=1e-8)


# --- GroupDRO ---------------------------------------------------------------------------------------------------------


def test_group_weights_move_first_and_then_weigh() -> None:
    made, b = method("GroupDRO", rate=0.5), batch()
    risks = loop_risks(made, b)
    weights = [math.exp(0.5 * r.item()) for r in risks]
    weights = [w / sum(weights) for w in weights]
    loss = made.training_step(b, 0)
    assert loss.item() == pytest.approx(sum(w * r.item() for w, r in zip(weights, risks, strict=True)), rel=1e-7)
    assert made.weights.tolist() == pytest.approx(weights, rel=1e-6)
    made.rate = 1000.0
    for _ in range(10):
        made.training_step(b, 0)
    assert made.weights.argmax().item() == max(range(S), key=lambda s: risks[s])
    assert made.weights.max() > 0.9
    before = made.weights.clone()
    made.eval()
    made.training_step(b, 0)
    assert torch.equal(before, made.weights)
    assert "weights" in made.state_dict()


# --- SAM --------------------------------------------------------------------------------------------------------------


def test_sharpness_aware_gradient_is_that_at_the_worst_weights() -> None:
    made, b = method("SharpnessAwareERM", rho=0.2), batch()
    above = copy.deepcopy(made.network)
    source = b["source"]
    found = torch.autograd.grad(F.cross_entropy(above(source["image"]), source["label"]), list(above.parameters()))
    norm = torch.sqrt(sum(g.square().sum() for g in found))
    before = [p.clone() for p in made.network.parameters()]
    with torch.no_grad():
        for p, g in zip(above.parameters(), found, strict=True):
            p += 0.2 * g / norm
    wanted = torch.autograd.grad(F.cross_entropy(above(source["image"]), source["label"]), list(above.parameters()))
    assert same(gradients(made), wanted)
    assert not same(wanted, found, 1e-4)
    assert all(torch.equal(p, q) for p, q in zip(before, made.network.parameters(), strict=True))


def test_running_statistics_are_those_of_erm() -> None:
    network = partial(NETWORK, arguments={"norm": True})
    counts = {}
    for name, arguments in (("ERM", {}), ("SharpnessAwareERM", {"rho": 5.0}), ("MLDG", {})):
        made = method(name, network=network, **arguments)
        made.training_step(batch(), 0)
        counts[name] = next(m for m in made.modules() if isinstance(m, torch.nn.BatchNorm2d)).state_dict()
    assert torch.equal(counts["ERM"]["running_mean"], counts["SharpnessAwareERM"]["running_mean"])
    assert [int(c["num_batches_tracked"]) for c in counts.values()] == [1, 1, 1]


# --- mixing -----------------------------------------------------------------------------------------------------------


def test_mixup_is_a_loop_over_the_ring_of_domains() -> None:
    made, source = method("InterDomainMixup", alpha=0.7), batch()["source"]
    torch.manual_seed(5)
    loss = made.training_step(batch(), 0)
    torch.manual_seed(5)
    order = torch.randperm(S)
    from zoo.losses import mixing_shares

    shares, total = mixing_shares(S, 0.7, dominant=False), 0.0
    parts = [(source["image"][source["domain"] == s], source["label"][source["domain"] == s]) for s in range(S)]
    for i in range(S):
        (x, y), (other_x, other_y) = parts[order[i]], parts[order[(i + 1) % S]]
        share = shares[i].double()
        z = made.network(share * x + (1 - share) * other_x)
        total = total + share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, other_y)
    assert loss.item() == pytest.approx((total / S).item(), rel=1e-6)
    assert shares.min() > 0.01
    with pytest.raises(UserError, match="cannot be mixed"):
        made.training_step({"source": {**source, "image": source["label"]}}, 0)


def test_styles_are_mixed_in_training_only_and_no_hook_stays() -> None:
    made, b = method("MixStyle", layers=["stages.0", "stages.1"], probability=1.0), batch()
    plain = method("ERM").training_step(b, 0)
    assert not torch.allclose(made.training_step(b, 0), plain)
    assert not any(module._forward_hooks for module in made.network.modules())
    with made.mixing(b["source"]["domain"]):
        made.eval()
        assert torch.allclose(made.network(b["source"]["image"]), method("ERM").network(b["source"]["image"]))
    rare = method("MixStyle", layers=["stages.0"], probability=0.25)
    losses = [rare.training_step(b, 0).item() for _ in range(200)]
    share = sum(abs(loss - plain.item()) > 1e-12 for loss in losses) / 200
    assert 0.15 < share < 0.35


def test_partners_in_style() -> None:
    domain = torch.tensor([0, 2, 1, 1, 0, 2])
    made = method("MixStyle", layers=["stages.0"], mix="crossdomain")
    for _ in range(20):
        partners = made.partners(domain)
        assert sorted(partners.tolist()) == list(range(6))
        assert (domain[partners] != domain).all()
    made.mix = "random"
    assert sorted(made.partners(domain).tolist()) == list(range(6))
    with pytest.raises(UserError, match=r"no layer 'stages.9'"):
        method("MixStyle", layers=["stages.9"])
    with pytest.raises(UserError, match="no feature map"):
        method("MixStyle", layers=["final"], probability=1.0).training_step(batch(), 0)


# --- MLDG -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "inner_step"), [("first", "gradient"), ("second", "gradient"), ("first", "sign")])
def test_meta_gradient_is_that_of_two_networks(order, inner_step) -> None:
    made, source = (
        method("MLDG", inner_lr=0.3, test_weight=0.7, test_domains=2, order=order, inner_step=inner_step),
        batch()["source"],
    )
    torch.manual_seed(3)
    ours = gradients(made)
    torch.manual_seed(3)
    chosen = torch.rand(S).argsort().tolist()
    rows = [torch.cat([(source["domain"] == s).nonzero().flatten() for s in part]) for part in (chosen[2:], chosen[:2])]
    named = dict(made.network.named_parameters())

    def risk(parameters, r):
        z = torch.func.functional_call(made.network, parameters, (source["image"][r],))
        return F.cross_entropy(z, source["label"][r])

    def moved(parameters):
        found = torch.autograd.grad(risk(parameters, rows[0]), list(parameters.values()), create_graph=True)
        step = torch.sign if inner_step == "sign" else torch.clone
        return {k: p - 0.3 * step(g) for (k, p), g in zip(parameters.items(), found, strict=True)}

    train = torch.autograd.grad(risk(named, rows[0]), list(named.values()))
    there = moved(named)
    if order == "second":
        test = torch.autograd.grad(risk(there, rows[1]), list(named.values()))
    else:
        there = {k: p.detach().requires_grad_() for k, p in there.items()}
        test = torch.autograd.grad(risk(there, rows[1]), list(there.values()))
    assert same(ours, [f + 0.7 * g for f, g in zip(train, test, strict=True)], 1e-10)


def test_second_order_differs_from_first_and_needs_equal_domains() -> None:
    found = {}
    for order in ("first", "second"):
        torch.manual_seed(3)
        made = method("MLDG", inner_lr=0.3, order=order)
        torch.manual_seed(3)
        found[order] = gradients(made)
    assert not same(found["first"], found["second"], 1e-5)
    with pytest.raises(UserError, match="as many samples"):
        made.training_step({"source": {key: value[1:] for key, value in batch()["source"].items()}}, 0)


# --- adversarial ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditional", [False, True])
def test_one_backward_is_the_explicit_min_max(conditional) -> None:
    made, b = (
        method("DomainAdversarialGeneralization", reversal=0.6, domain_weight=1.5, conditional=conditional),
        batch(),
    )
    source, theirs = b["source"], copy.deepcopy(made)
    ours = gradients(made, b)
    features = theirs.network.features(source["image"])
    label_loss = F.cross_entropy(theirs.network.logits(features), source["label"])
    seen = features + theirs.embedding(source["label"]) if conditional else features
    losses = F.cross_entropy(theirs.domain_classifier(seen), source["domain"], reduction="none")
    if conditional:
        counts = source["label"].bincount(minlength=3)
        losses = losses / (counts[source["label"]] * (counts > 0).sum()) * len(losses)
    domain_loss = 1.5 * losses.mean()
    body = list(theirs.network.parameters())
    fit = torch.autograd.grad(label_loss, body, retain_graph=True)
    confuse = torch.autograd.grad(domain_loss, body, retain_graph=True, allow_unused=True)
    wanted = [f if c is None else f - 0.6 * c for f, c in zip(fit, confuse, strict=True)]
    assert same(ours, wanted, 1e-7)
    assert any(c is not None and c.abs().sum() > 0 for c in confuse)
    for p, q in zip(
        made.domain_classifier.parameters(),
        torch.autograd.grad(domain_loss, list(theirs.domain_classifier.parameters())),
        strict=True,
    ):
        assert torch.allclose(p.grad, q, atol=1e-7)


def test_classifier_of_domains_has_an_output_for_each_and_the_ramp_begins_at_zero() -> None:
    made = method("DomainAdversarialGeneralization", step=0, ramp=0.5)
    assert made.domain_classifier(torch.zeros(2, made.network.num_features, dtype=torch.float64)).shape == (2, S)
    assert made.strength == 0
    made._trainer.global_step = 500
    assert made.strength == pytest.approx(2 / (1 + math.exp(-10)) - 1)
    assert method("DomainAdversarialGeneralization", step=0).strength == 1


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "what"),
    [
        ("ERM", {"num_domains": 0}, "num_domains=0"),
        ("IRM", {"penalty_weight": -1}, "penalty_weight=-1"),
        ("IRM", {"estimator": "square"}, "Did you mean 'squared'"),
        ("VREx", {"annealing_steps": -1}, "annealing_steps=-1"),
        ("Fishr", {"momentum": 1.0}, "momentum=1.0"),
        ("GroupDRO", {"rate": float("nan")}, "rate=nan"),
        ("InterDomainMixup", {"alpha": -0.1}, "alpha=-0.1"),
        ("MLDG", {"test_domains": 3}, "test_domains=3"),
        ("MLDG", {"inner_lr": 0.0}, "inner_lr=0"),
        ("MLDG", {"inner_step": "sign"}, "second order"),
        ("MLDG", {"order": "third"}, "order='third'"),
        ("CORALGeneralization", {"penalty_weight": -1.0}, "penalty_weight=-1"),
        ("MMDGeneralization", {"gammas": [0.0]}, "gammas="),
        ("MixStyle", {"layers": []}, "layers="),
        ("MixStyle", {"layers": ["stages.0"], "alpha": 0.0}, "alpha=0.0"),
        ("MixStyle", {"layers": ["stages.0"], "mix": "cross"}, "mix='cross'"),
        ("SharpnessAwareERM", {"rho": -1.0}, "rho=-1"),
        ("DomainAdversarialGeneralization", {"ramp": 2.0}, "ramp=2.0"),
        ("DomainAdversarialGeneralization", {"reversal": -1.0}, "reversal=-1"),
    ],
)
def test_refusals(name, arguments, what) -> None:
    with pytest.raises(UserError, match=what):
        method(name, **arguments)


def test_the_data_must_have_as_many_domains() -> None:
    made = method("ERM")
    made._trainer = SimpleNamespace(
        callbacks=[], datamodule=SimpleNamespace(num_domains=2, num_classes=3), training=False
    )
    with pytest.raises(UserError, match="num_domains=3, but SimpleNamespace has 2"):
        made.setup("fit")
