"""What the host seams refuse: other versions, unknown schedulers, layouts that do not fit."""

from types import SimpleNamespace

import pytest
import torch

from branchcore.hosts import (
    awm,
    branch_grpo,
    dance_grpo,
    diffusion_nft,
    flow_factory,
    flow_factory_advantage,
    mix_grpo,
    trl,
    verl_omni,
)

X = torch.zeros(2, 3, 5)
V, Y = X + 1, X + 2
SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.0])
EIGHT = (V, X, 0.3, SIGMAS, 1, Y, True, True)
SIX = EIGHT[:6]
DANCE = SimpleNamespace(eta=0.3)
MIX = SimpleNamespace(
    eta=0.3, flow_grpo_sampling=True, sde_type="sde", noise_level=None, dpm_algorithm_type="null"
)


def scheduler(**changed):
    fields = {
        "sigmas": SIGMAS,
        "timesteps": SIGMAS[:-1] * 1000,
        "dynamics_type": "Flow-SDE",
        "is_eval": False,
        "step_index": 1,
        "index_for_timestep": lambda t: 1,
        "get_noise_level_for_sigma": lambda sigma: 0.7 + 0 * sigma,
        "config": SimpleNamespace(),
    }
    kept = {k: v for k, v in {**fields, **changed}.items() if v is not None}
    return SimpleNamespace(**kept)


def factory(v=V, x=X, y=Y, changed=None, timestep=800.0, **options):
    return flow_factory.step(scheduler(**(changed or {})), v, timestep, x, y, **options)


def verl(v=V, x=X, y=Y, changed=None, **options):
    host = scheduler(**(changed or {}))
    return verl_omni.sample_previous_step(host, x, v, prev_sample=y, **options)


CALLS = {
    "DanceGRPO 22b85ef": lambda **o: dance_grpo.flux_step(*EIGHT, **o),
    "MixGRPO d270daf": lambda **o: mix_grpo.flow_grpo_step(*SIX, **o),
    "BranchGRPO ffc3c90": lambda **o: branch_grpo.flux_step_with_split(*EIGHT, **o),
    "Flow-Factory 316aaa0": factory,
    "verl-omni 39809f6": verl,
    "AWM 12b1397": lambda **o: awm.log_prob_awm(V, torch.ones(2), X, Y, **o),
    "DiffusionNFT 24af555": lambda **o: diffusion_nft.reward_probability(X, adv_clip_max=5, **o),
    "TRL ce01fd5": lambda **o: trl.policy_loss(X, X, X, **o),
    "Flow-Factory 3a2a482": lambda **o: flow_factory_advantage.gdpo(None, [], {}, **o),
}


@pytest.mark.parametrize("host", CALLS)
def test_a_keyword_of_another_version_names_the_version_read(host):
    with pytest.raises(
        TypeError, match=rf"arguments must be those of {host}, \(.*\), got 'sde_v2'"
    ):
        CALLS[host](sde_v2=True)


def test_an_argument_too_many_names_the_version_read():
    message = r"dance_grpo.flux_step: .* of DanceGRPO 22b85ef, .*, got 9 positional arguments"
    with pytest.raises(TypeError, match=message):
        dance_grpo.flux_step(*EIGHT, 1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'sde_solver'"):
        dance_grpo.flux_step(*EIGHT[:-1])


STEPS = {
    "dance_grpo.flux_step": lambda v=V, x=X, y=Y: dance_grpo.flux_step(
        v, x, 0.3, SIGMAS, 1, y, True, True
    ),
    "dance_grpo.one_step_log_prob": lambda v=V, x=X, y=Y: dance_grpo.one_step_log_prob(
        DANCE, v, x, y, 1, SIGMAS
    ),
    "mix_grpo.flow_grpo_step": lambda v=V, x=X, y=Y: mix_grpo.flow_grpo_step(
        v, x, 0.7, SIGMAS, 1, y
    ),
    "mix_grpo.dance_grpo_step": lambda v=V, x=X, y=Y: mix_grpo.dance_grpo_step(
        v, x, 0.3, SIGMAS, 1, y, True, True
    ),
    "mix_grpo.one_step_log_prob": lambda v=V, x=X, y=Y: mix_grpo.one_step_log_prob(
        MIX, v, x, y, 1, SIGMAS
    ),
    "branch_grpo.flux_step_with_split": lambda v=V, x=X, y=Y: branch_grpo.flux_step_with_split(
        v, x, 0.3, SIGMAS, 1, y, True, True
    ),
    "branch_grpo.one_step_log_prob": lambda v=V, x=X, y=Y: branch_grpo.one_step_log_prob(
        DANCE, v, x, y, 1, SIGMAS
    ),
    "flow_factory.step": factory,
    "verl_omni.sample_previous_step": verl,
}


@pytest.mark.parametrize("op", STEPS)
def test_layouts_that_do_not_match(op):
    wanted = rf"{op}: \w+ must have the shape of (latents|sample), \(2, 3, 5\), got \(2, 5, 3\)"
    with pytest.raises(ValueError, match=wanted):
        STEPS[op](v=V.mT)
    with pytest.raises(ValueError, match=wanted):
        STEPS[op](y=Y.mT)
    with pytest.raises(
        ValueError, match=rf"{op}: (latents|sample) must be floats \(B, ...\), got .* \(2,\)"
    ):
        STEPS[op](x=X[:, 0, 0])
    with pytest.raises(ValueError, match=rf"{op}: (latents|sample) must be floats"):
        STEPS[op](x=X.long())
    with pytest.raises(
        NotImplementedError, match=rf"{op}: (latents|sample) must not require a gradient"
    ):
        STEPS[op](x=X.clone().requires_grad_())


@pytest.mark.parametrize(
    ("sigmas", "index", "message"),
    [
        (SIGMAS, 3, r"index must be in \[0, 3\), got 3"),
        (SIGMAS, -1, r"index must be in \[0, 3\), got -1"),
        (SIGMAS[:, None], 1, r"sigmas must be \(T \+ 1,\), T > 0, got \(4, 1\)"),
        (SIGMAS.flip(0), 1, r"sigmas must fall inside \[0, 1\], got 0.5 before 0.8"),
        (SIGMAS * 1000, 1, r"sigmas must fall inside \[0, 1\], got 800 before 500; .*timesteps"),
    ],
)
def test_schedules_that_are_none(sigmas, index, message):
    for call in (
        lambda: dance_grpo.flux_step(V, X, 0.3, sigmas, index, Y, True, True),
        lambda: dance_grpo.one_step_log_prob(DANCE, V, X, Y, index, sigmas),
        lambda: mix_grpo.flow_grpo_step(V, X, 0.7, sigmas, index, Y),
        lambda: branch_grpo.flux_step_with_split(V, X, 0.3, sigmas, index, Y, True, True),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sigmas": None}, "must have the field sigmas, got none"),
        ({"is_eval": None}, "must have the field is_eval, got none"),
        ({"get_noise_level_for_sigma": None}, "must have the field get_noise_level_for_sigma"),
        ({"dynamics_type": "Flow-SDE2"}, "dynamics_type must be one of .*, got 'Flow-SDE2'"),
        ({"sigmas": SIGMAS.flip(0)}, "sigmas must fall inside"),
        ({"get_noise_level_for_sigma": lambda s: torch.ones(3)}, r"or \(2,\), got \(3,\)"),
    ],
)
def test_flow_factory_schedulers_with_other_fields(changed, message):
    with pytest.raises(ValueError, match=rf"flow_factory.step: .*{message}"):
        factory(changed=changed)


@pytest.mark.parametrize("name", ["stochastic_sampling", "invert_sigmas", "solver_order"])
def test_flow_factory_schedulers_that_step_otherwise(name):
    changed = {"config": SimpleNamespace(**{name: 2})}
    with pytest.raises(NotImplementedError, match=f"scheduler.config.{name} must be unset, got 2"):
        factory(changed=changed)


def test_flow_factory_arguments():
    with pytest.raises(NotImplementedError, match=r"timestep must be a float .*, got 1; try"):
        factory(timestep=1)
    with pytest.raises(ValueError, match=r"timestep must be a number or \(2,\), got \(3,\)"):
        factory(timestep=torch.ones(3))
    with pytest.raises(ValueError, match=r"return_kwargs must be one of .*, got 'x0'"):
        factory(return_kwargs=["x0"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sigmas": None}, "must have the field sigmas, got none"),
        ({"step_index": None}, "must have the field step_index, got none"),
        ({"sigmas": SIGMAS * 1000}, "sigmas must fall inside"),
        ({"step_index": 3}, r"index must be in \[0, 3\), got 3"),
    ],
)
def test_verl_omni_schedulers_with_other_fields(changed, message):
    with pytest.raises(ValueError, match=rf"verl_omni.sample_previous_step: .*{message}"):
        verl(changed=changed)


def test_verl_omni_arguments():
    with pytest.raises(ValueError, match="sde_type must be one of cps, sde, dance_sde, got 'ode'"):
        verl(sde_type="ode")
    with pytest.raises(NotImplementedError, match="per_token_timesteps must be None"):
        verl(per_token_timesteps=X)
    with pytest.raises(ValueError, match=r"timestep must be \(2,\), got \(1,\)"):
        verl(timestep=torch.ones(1))
    never = SimpleNamespace(sigmas=SIGMAS, step_index=None)
    with pytest.raises(ValueError, match="timestep must be given before the scheduler's first"):
        verl_omni.sample_previous_step(never, X, V)


def test_options_of_dance_mix_and_branch():
    with pytest.raises(ValueError, match="eta must be positive, got 0"):
        dance_grpo.flux_step(V, X, 0.0, SIGMAS, 1, Y, True, True)
    mean, _ = dance_grpo.flux_step(V, X, 0.0, SIGMAS, 1, None, False, True)
    torch.testing.assert_close(mean, X - 0.3 * V)
    with pytest.raises(ValueError, match="generator must be None where prev_sample is given"):
        mix_grpo.flow_grpo_step(*SIX, generator=torch.Generator())
    with pytest.raises(ValueError, match="sde_type must be one of sde, cps, got 'ode'"):
        mix_grpo.dance_grpo_step(*EIGHT, sde_type="ode")
    with pytest.raises(ValueError, match=r"num_splits must be at least 1 .* got 0 and 4.0"):
        branch_grpo.flux_step_with_split(*EIGHT, 0, 4.0)
    with pytest.raises(ValueError, match="scored must be one of released, drawn, got 'paper'"):
        branch_grpo.flux_step_with_split(*EIGHT, scored="paper")


def test_arguments_of_the_run_that_are_not_there():
    score = dance_grpo.one_step_log_prob
    with pytest.raises(ValueError, match="SimpleNamespace must have the field eta, got none"):
        score(SimpleNamespace(), V, X, Y, 1, SIGMAS)
    solver = SimpleNamespace(**{**vars(MIX), "dpm_algorithm_type": "dpmsolver++"})
    with pytest.raises(ValueError, match="must have the field dpm_apply_strategy"):
        mix_grpo.one_step_log_prob(solver, V, X, Y, 1, SIGMAS)
    solver.dpm_apply_strategy = "all"
    with pytest.raises(NotImplementedError, match="dpm_apply_strategy must be post, got 'all'"):
        mix_grpo.one_step_log_prob(solver, V, X, Y, 1, SIGMAS)
    solver.dpm_apply_strategy = "post"
    assert mix_grpo.one_step_log_prob(solver, V, X, Y, 1, SIGMAS).shape == (2,)


B = torch.zeros(4)
BOUNDS = SimpleNamespace(diffusion_loss=SimpleNamespace(clip_ratio=1e-4, adv_clip_max=5))


def test_losses_of_vectors_that_do_not_match():
    call = {"clip_range": 1e-4, "adv_clip_max": 5}
    with pytest.raises(ValueError, match=r"log_probs must be \(4,\) like new_log_probs, got \(3,"):
        dance_grpo.policy_loss(B, B[:3], B, **call)
    with pytest.raises(ValueError, match=r"new_log_probs must be \(B,\).*, got \(4, 1\)"):
        dance_grpo.policy_loss(B[:, None], B, B, **call)
    with pytest.raises(ValueError, match=r"advantages must be \(4,\) like log_prob, got \(\)"):
        trl.policy_loss(B, B, B[0], train_clip_range=1e-4, train_adv_clip_max=5)
    named = {"old_log_prob": B, "log_prob": B, "advantages": B}
    with pytest.raises(ValueError, match=r"rollout_is_weights must be \(4,\) like log_prob"):
        verl_omni.flow_grpo_loss(**named, config=BOUNDS, rollout_is_weights=B[:2])
    with pytest.raises(ValueError, match="must have the field diffusion_loss"):
        verl_omni.flow_grpo_loss(**named, config=SimpleNamespace())
    bare = SimpleNamespace(diffusion_loss=SimpleNamespace(clip_ratio=1e-4))
    with pytest.raises(ValueError, match="must have the field adv_clip_max"):
        verl_omni.flow_grpo_loss(**named, config=bare)


def test_matching_losses_of_layouts_that_do_not_match():
    t = torch.ones(2)
    with pytest.raises(ValueError, match=r"weighting must be one of Uniform, .*, got 'u'"):
        awm.log_prob_awm(V, t, X, Y, "u")
    with pytest.raises(ValueError, match=r"timestep must be \(2,\), one per sample, got \(3,\)"):
        awm.log_prob_awm(V, torch.ones(3), X, Y)
    with pytest.raises(ValueError, match=r"timestep must be \(2,\) for kl_weight ELBO"):
        awm.velocity_kl(V, X, "ELBO")
    train = SimpleNamespace(adv_clip_max=5, advantage_max=1, clip_range=1, loss_type="sum_first")
    config = SimpleNamespace(train=train)
    with pytest.raises(ValueError, match=r"must be \(T, B\), got \(4,\) and \(4,\)"):
        awm.policy_loss(config, B, B, B)
    with pytest.raises(
        ValueError, match=r"advantages must be \(4,\) like log_probs\[0\], got \(3,"
    ):
        awm.policy_loss(config, B[None], B[None], B[:3])
    train.loss_type = "mean"
    with pytest.raises(ValueError, match="loss_type must be one of sum_first, exp_first"):
        awm.policy_loss(config, B[None], B[None], B)
    call = {"beta": 1.0, "adv_clip_max": 5, "kl_weight": 0.0}
    with pytest.raises(ValueError, match=r"t and r must be \(2,\).*, got \(2,\) and \(3,\)"):
        diffusion_nft.policy_loss(V, V, None, X, Y, t, torch.ones(3), **call)
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        diffusion_nft.policy_loss(V, V, None, X, Y, t, t, **{**call, "beta": 0.0})
    with pytest.raises(ValueError, match=r"adv_mode must be one of all, .*, got 'some'"):
        diffusion_nft.reward_probability(t, adv_clip_max=5, adv_mode="some")


def test_flow_factory_processors_and_groups_that_do_not_fit():
    processor = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        group_on_same_rank=True,
        group_size=2,
        global_std=False,
        reward_weights={"hps": 1.0},
    )
    samples = [SimpleNamespace(unique_id=i) for i in (1, 1, 2)]
    aggregate = flow_factory_advantage.weighted_sum
    with pytest.raises(ValueError, match="groups must have group_size=2 samples, got"):
        aggregate(processor, samples, {"hps": torch.ones(3)}, False)
    with pytest.raises(ValueError, match=r"hps must be \(3,\), one per sample, got 2"):
        aggregate(processor, samples, {"hps": torch.ones(2)}, False)
    with pytest.raises(ValueError, match=r"must have weights, .* \['hps'\], got \['clip'\]"):
        aggregate(processor, samples, {"clip": torch.ones(3)}, False)
    with pytest.raises(ValueError, match="rewards must be finite, got NaN or Inf in hps"):
        flow_factory_advantage.gdpo(processor, samples, {"hps": torch.tensor([1, 2, torch.nan])})
    with pytest.raises(ValueError, match="must have the field unique_id"):
        aggregate(processor, [SimpleNamespace()], {"hps": torch.ones(1)}, False)
    del processor.global_std
    with pytest.raises(ValueError, match="must have the field global_std"):
        aggregate(processor, samples, {"hps": torch.ones(3)}, False)


MODULES = [
    awm,
    branch_grpo,
    dance_grpo,
    diffusion_nft,
    flow_factory,
    flow_factory_advantage,
    mix_grpo,
    trl,
    verl_omni,
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_each_file_opens_with_version_seam_and_what_is_not_supported(module):
    for part in (module.VERSION, "Seam: ", "iffers from the host", "Not supported: "):
        assert part in module.__doc__, part
