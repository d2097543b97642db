"""The loss of a micro-batch as a recipe has it: the chosen pieces in their places, and the coefficients that move."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import CPU

from rlpost.algorithm_recipe import Algorithm, CriticRecipe, Entropy, Kl, KlReset, Mismatch
from rlpost.algorithms import CORRECTIONS, LOSSES, with_parameters
from rlpost.batch import make_batch
from rlpost.document import Document
from rlpost.objective import Objective, bind_loss
from rlpost.packing import Packer

nan, inf = math.nan, math.inf


class Alone:
    rank, size = 0, 1

    def all_gather_object(self, item):
        return [item]

    def max(self, value):
        return value


def documents(**scores):
    """Two answers, one good and one bad; the second has a token without a log-prob."""
    good = Document((2, 3), (4, 5, 1), (-0.5, -1.0, -0.25), 1.0, group=0, correct=True, version=3)
    bad = Document((2, 3), (6, 7, 1), (-0.75, nan, -0.5), -1.0, group=1, version=2)
    return [replace(one, scores={k: torch.tensor(v) for k, v in scores.items()}) for one in (good, bad)]


def micro_of(parts=None, **options):
    [micro] = make_batch(parts or documents(), Packer(16, 12, CPU), Alone(), **options).micros
    return micro


def logp_of(micro, shift=0.0):
    """What the trainer says: the behaviour's log-prob and a little, and rubbish where nothing is trained."""
    logp_BT = torch.where(
        micro.mask_BT, micro.behavior_logp_BT.double() + shift, torch.tensor(nan, dtype=torch.float64)
    )
    return logp_BT.requires_grad_()


def run(algorithm, micro=None, *, shift=0.0, entropy=0.5, objective=None, measured=True):
    micro = micro_of() if micro is None else micro
    objective = objective or Objective(algorithm, Alone())
    logp_BT = logp_of(micro, shift)
    entropy_BT = torch.full_like(logp_BT, entropy)
    loss, logged = objective.policy_loss(micro, logp_BT, entropy_BT, version=3, measured=measured)
    loss.backward()
    return loss.item(), logp_BT.grad[micro.mask_BT], logged


PLAIN = Algorithm(loss={"use": "reinforce"})


def test_policy_gradient_is_the_loss_under_the_weights():
    loss, grad, logged = run(PLAIN)
    # 5 trained tokens: -A logp / 5
    assert loss == pytest.approx((0.5 + 1.0 + 0.25 - 0.75 - 0.5) / 5)
    assert grad.tolist() == pytest.approx([-0.2] * 3 + [0.2] * 2)
    assert set(logged) >= {"policy/loss", "policy/entropy", "policy/ratio_mean", "policy/ratio_max"}


@pytest.mark.parametrize("use", sorted(LOSSES))
def test_t20_every_loss_is_finite_with_rubbish_under_the_mask(use):
    algorithm = Algorithm(loss=with_parameters({"use": use}, LOSSES))
    micro = micro_of()
    loss, grad, logged = run(algorithm, micro, shift=0.1)
    assert math.isfinite(loss) and bool(torch.isfinite(grad).all())
    for x_BT in logged.values():
        assert bool(torch.isfinite(x_BT[micro.mask_BT]).all())


def test_a_users_loss_gets_what_its_signature_asks_for():
    loss = bind_loss({"use": "test_objective:signed", "scale": 3.0})
    micro = micro_of()
    loss_BT, stats = loss(logp_of(micro), micro.behavior_logp_BT, micro.adv_BT, micro)
    assert torch.equal(stats["mine"], micro.document_BT.float())
    assert loss_BT[micro.mask_BT].tolist() == [-3.0] * 3 + [3.0] * 2
    _, _, logged = run(Algorithm(loss={"use": "test_objective:signed", "scale": 3.0}))
    assert "policy/mine" in logged


def signed(logp_BT, behavior_logp_BT, adv_BT, *, document_BT, scale: float):
    """A loss as a user would write it."""
    return -scale * adv_BT * torch.exp(logp_BT - logp_BT.detach()), {"mine": document_BT.float()}


def test_t13_kl_in_the_loss_doubles_with_its_coefficient_and_leaves_masked_tokens_alone():
    micro = micro_of(documents(ref_logp=[-0.25, -0.5, -0.5]))
    grads = [run(replace(PLAIN, kl=Kl(coef=coef, estimator="k2")), micro)[1] for coef in (0.0, 0.5, 1.0)]
    d = micro.behavior_logp_BT - micro.scores["ref_logp"]
    torch.testing.assert_close(grads[1] - grads[0], 0.5 * d[micro.mask_BT].double() / 5)
    torch.testing.assert_close(grads[2] - grads[0], 2 * (grads[1] - grads[0]))


def test_kl_in_the_reward_is_logged_and_not_in_the_loss():
    micro = micro_of(documents(ref_logp=[-0.25, -0.5, -0.5], prox_logp=[-0.5, -1.0, -0.25]))
    asked = replace(PLAIN, kl=Kl(coef=0.5, place="reward", estimator="k1"))
    _, grad, logged = run(asked, micro)
    torch.testing.assert_close(grad, run(PLAIN, micro)[1])
    assert "policy/kl_ref" in logged and Objective(asked, Alone()).needs_prox


def test_t15_decoupled_ratio_is_one_where_only_the_generator_differs():
    """prox = behaviour + .1: the correction is e^.1 and the ratio of the loss 1; bypass has e^.1 in the ratio."""
    prox = [-0.4, -0.9, -0.15]
    good = replace(documents()[0], scores={"prox_logp": torch.tensor(prox)})
    micro = micro_of([good])
    clip = {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2}
    tis = Mismatch("decoupled", [{"use": "tis_token", "cap": 2.0}])
    decoupled = Algorithm(loss=clip, mismatch=tis, minibatches=2)
    _, grad, logged = run(decoupled, micro, shift=0.1)
    assert logged["policy/ratio_mean"][micro.mask_BT].tolist() == pytest.approx([1.0] * 3)
    assert grad.tolist() == pytest.approx([-math.exp(0.1) / 3] * 3)
    _, grad, logged = run(Algorithm(loss=clip), micro, shift=0.1)
    assert logged["policy/ratio_mean"][micro.mask_BT].tolist() == pytest.approx([math.exp(0.1)] * 3)
    assert grad.tolist() == pytest.approx([-math.exp(0.1) / 3] * 3)
    assert run(Algorithm(loss=clip), micro)[1].tolist() == pytest.approx([-1 / 3] * 3)


def test_a_single_update_a_batch_needs_no_pass_of_its_own_to_decouple():
    tis = Mismatch("decoupled", [{"use": "tis_token", "cap": 2.0}])
    assert not Objective(Algorithm(mismatch=tis), Alone()).needs_prox
    assert Objective(Algorithm(mismatch=tis, minibatches=2), Alone()).needs_prox
    assert Objective(Algorithm(mismatch=tis, epochs=2), Alone()).needs_prox
    _, grad, logged = run(replace(PLAIN, mismatch=tis), shift=math.log(4.0))
    assert grad.tolist() == pytest.approx([-0.4] * 3 + [0.4] * 2)  # the ratio 4 is truncated to 2
    assert logged["policy/ratio_mean"][micro_of().mask_BT].tolist() == pytest.approx([1.0] * 5)


@pytest.mark.parametrize("use", sorted(CORRECTIONS))
def test_t15_every_correction_is_one_where_trainer_and_generator_agree(use):
    asked = Mismatch("decoupled", [with_parameters({"use": use}, CORRECTIONS)])
    torch.testing.assert_close(run(replace(PLAIN, mismatch=asked))[1], run(PLAIN)[1])


def test_weights_multiply_and_a_rejected_token_stays_in_the_denominator():
    asked = Mismatch("decoupled", [{"use": "tis_token", "cap": 2.0}, {"use": "icepop", "low": 0.5, "high": 3.0}])
    _, grad, _ = run(replace(PLAIN, mismatch=asked), shift=math.log(2.5))
    assert grad.tolist() == pytest.approx([-0.2 * 2.0 * 2.5] * 3 + [0.2 * 2.0 * 2.5] * 2)
    _, grad, _ = run(replace(PLAIN, mismatch=asked), shift=math.log(3.5))
    assert grad.tolist() == [0.0] * 5


def test_offpolicy_limit_drops_only_drifted_answers_of_negative_advantage():
    asked = replace(PLAIN, mismatch=Mismatch(offpolicy_limit=0.5))
    assert run(asked, shift=-0.6)[1].tolist() == pytest.approx([-0.2] * 3 + [0.0] * 2)
    assert run(asked, shift=-0.4)[1].tolist() == pytest.approx([-0.2] * 3 + [0.2] * 2)


def test_entropy_bonus_has_the_gradient_of_the_entropy():
    asked, micro = replace(PLAIN, entropy=Entropy(coef=0.1)), micro_of()
    entropy_BT = torch.full_like(micro.adv_BT, 0.5).requires_grad_()
    loss, _ = Objective(asked, Alone()).policy_loss(micro, logp_of(micro), entropy_BT, version=0, measured=True)
    loss.backward()
    assert entropy_BT.grad[micro.mask_BT].tolist() == pytest.approx([-0.02] * 5)
    assert not entropy_BT.grad[~micro.mask_BT].any()


def test_steered_bonus_applies_below_its_target_and_moves_once_a_step():
    asked = replace(PLAIN, entropy=Entropy(coef=0.1, target=0.4, delta=0.05, low=0.0, high=0.2))
    objective = Objective(asked, Alone())
    assert objective.bonus == 0.0  # nothing is known before the first step
    objective.after_step(0, {"policy/entropy": 0.3})
    assert objective.bonus == pytest.approx(0.15)
    objective.after_step(1, {"policy/entropy": 0.5})
    assert objective.bonus == 0.0 and objective.entropy_coef == pytest.approx(0.1)
    again = Objective(asked, Alone())
    again.load_state_dict(objective.state_dict())
    assert again.state_dict() == objective.state_dict()


def test_top_entropy_tokens_are_those_of_the_whole_step():
    parts = documents(entropy=[0.1, 0.9, 0.8])
    asked = replace(PLAIN, entropy=Entropy(top_frac=0.6))
    objective = Objective(asked, Alone())
    objective.begin(parts)
    assert objective.entropy_threshold == pytest.approx(0.8) and objective.needs_prox  # 3 of .1 .9 .8 .1 .8
    _, grad, _ = run(asked, micro_of(parts), objective=objective)
    assert grad.tolist() == pytest.approx([0.0, -0.2, -0.2, 0.0, 0.2])


def test_imitation_has_its_own_denominator():
    _, grad, _ = run(replace(PLAIN, imitation_coef=0.3))
    assert grad.tolist() == pytest.approx([-0.2 - 0.1] * 3 + [0.2] * 2)


def test_adaptive_kl_coefficient_moves_towards_its_target():
    objective = Objective(replace(PLAIN, kl=Kl(coef=0.1, target=1.0, horizon=10.0)), Alone())
    objective.after_step(0, {"policy/kl_ref": 3.0, "rollouts/num": 5.0})
    assert objective.kl_coef == pytest.approx(0.11)
    objective.after_step(1, {"policy/kl_ref": 0.0, "rollouts/num": 5.0})
    assert objective.kl_coef == pytest.approx(0.099)


def test_reference_is_reset_by_schedule_spike_and_stall():
    def objective(**rule):
        return Objective(replace(PLAIN, kl=Kl(coef=0.1, reset=KlReset(**rule))), Alone())

    quiet = {"policy/kl_ref": 0.1, "rollouts/num": 1.0}
    scheduled = objective(every=2)
    assert [scheduled.after_step(step, quiet) for step in range(4)] == [None, "schedule", None, "schedule"]
    assert scheduled.figures()["policy/ref_resets"] == 2.0
    assert objective(kl_spike=0.5).after_step(0, quiet | {"policy/kl_ref": 0.6}) == "kl_spike"
    stalling = objective(patience=2)
    for score in (0.5, 0.4, 0.5):
        stalling.after_evaluation(score)
    assert stalling.after_step(0, quiet) == "stalled"


def test_value_loss_is_clipped_around_the_scored_value():
    parts = [replace(one, scores=one.scores | {"return": torch.ones(3)}) for one in documents(value=[0.0, 0.0, 0.0])]
    micro = micro_of(parts)
    objective = Objective(replace(PLAIN, critic=CriticRecipe(value_clip=0.2)), Alone())
    value_BT = torch.where(micro.mask_BT, torch.tensor(0.5), torch.tensor(inf)).requires_grad_()
    loss, logged = objective.value_loss(micro, value_BT)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 0.8**2)  # the clipped error, 1 - .2, is the larger
    assert value_BT.grad[micro.mask_BT].tolist() == [0.0] * 5 and not value_BT.grad[~micro.mask_BT].any()
    assert logged["critic/error"][micro.mask_BT].tolist() == [0.5] * 5


def test_mismatch_is_measured_whole_and_by_the_age_of_the_writing_policy():
    objective, micro = Objective(PLAIN, Alone()), micro_of()
    run(PLAIN, micro, shift=0.1, objective=objective)
    run(PLAIN, micro, shift=9.0, objective=objective, measured=False)  # after an update: the policy's own change
    figures = objective.mismatch_figures()
    assert figures["mismatch/logp_diff_mean"] == pytest.approx(0.1)
    assert figures["mismatch/k1"] == pytest.approx(-0.1) and figures["mismatch/clipped_frac"] == 0.0
    assert figures["mismatch/ess_frac"] == pytest.approx(1.0)
    assert {"mismatch/age_0/logp_diff_max", "mismatch/age_1/logp_diff_p99"} <= figures.keys()
    objective.begin([])
    assert objective.mismatch_figures() == {}


def test_clipped_share_counts_corrections_that_are_not_the_ratio():
    objective = Objective(replace(PLAIN, mismatch=Mismatch("decoupled", [{"use": "tis_token", "cap": 2.0}])), Alone())
    run(PLAIN, shift=1.0, objective=objective)
    assert objective.mismatch_figures()["mismatch/clipped_frac"] == 1.0
