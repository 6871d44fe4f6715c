"""Each loss against a slow, obvious computation of it."""

import math

import pytest
import torch

from training.data.batch import NO_TARGET
from training.losses import flow, hints, tokens
from training.losses.hints import TrainingHeads

GENERATOR = torch.Generator


def heads() -> TrainingHeads:
    torch.manual_seed(0)
    return TrainingHeads(vision_width=6, width=8, kinds=4, frequencies=2, action_dim=3, state_dim=3)


def test_postfix_loss_counts_only_unpadded_tokens() -> None:
    torch.manual_seed(0)
    logits, postfix = torch.randn(2, 3, 7), torch.tensor([[1, 2, 3], [4, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    log_p = logits.log_softmax(-1)
    by_hand = -(log_p[0, 0, 1] + log_p[0, 1, 2] + log_p[0, 2, 3] + log_p[1, 0, 4]) / 4
    torch.testing.assert_close(tokens.predict_postfix(torch.nn.Identity(), logits, postfix, mask), by_hand)


def test_postfix_loss_in_pieces_equals_the_whole_one_with_all_gradients() -> None:
    torch.manual_seed(0)
    table, hidden = torch.randn(11, 4, requires_grad=True), torch.randn(3, 5, 4, requires_grad=True)
    postfix, mask = torch.randint(0, 11, (3, 5)), torch.rand(3, 5) < 0.7
    largest = []

    def logits(rows: torch.Tensor) -> torch.Tensor:
        largest.append(len(rows))
        return rows @ table.T

    whole = tokens.predict_postfix(lambda rows: rows @ table.T, hidden, postfix, mask)
    pieces = tokens.predict_in_pieces(logits, hidden, postfix, mask, rows=4)
    torch.testing.assert_close(pieces, whole)
    for got, expected in zip(*(torch.autograd.grad(loss, (table, hidden)) for loss in (pieces, whole)), strict=True):
        torch.testing.assert_close(got, expected)
    assert max(largest) == 4 and len(largest) == 2 * -(-int(mask.sum()) // 4), "each piece once more for its gradient"


def test_next_token_hidden_starts_at_each_samples_own_last_prompt_token() -> None:
    prefix, postfix = torch.arange(24.0).reshape(2, 4, 3), 100 + torch.arange(12.0).reshape(2, 2, 3)
    hidden = tokens.next_token_hidden(prefix, torch.tensor([3, 1]), postfix)
    assert torch.equal(hidden[0], torch.stack([prefix[0, 3], postfix[0, 0]]))
    assert torch.equal(hidden[1], torch.stack([prefix[1, 1], postfix[1, 0]]))


def test_pointing_rewards_the_targets_cell_and_skips_samples_without_one() -> None:
    scores = torch.zeros(3, 2, 5, requires_grad=True)
    masked = scores.masked_fill(torch.tensor([True, False, False, False, False]), -torch.inf)
    loss = hints.point_at_target(masked, torch.tensor([1, NO_TARGET, 0]), first_cell=1)
    assert float(loss.detach()) == pytest.approx(math.log(4))
    loss.backward()
    assert scores.grad is not None
    assert torch.equal(scores.grad[1], torch.zeros(2, 5))
    assert (scores.grad[0, :, 2] < 0).all() and (scores.grad[2, :, 1] < 0).all()
    nothing = hints.point_at_target(scores, torch.full((3,), NO_TARGET), first_cell=1)
    assert float(nothing.detach()) == 0.0


def test_readout_learns_mean_and_spread_of_its_coefficients() -> None:
    torch.manual_seed(0)
    module = heads()
    centre = torch.tensor([[-60.0, 0.0, 7.0], [2.0, -2.0, 100.0]])
    coefficient = (centre + torch.tensor([1.0, 3.0, 0.5]) * torch.randn(500, 2, 3)).round()
    hidden = torch.zeros(500, 2, 8)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        hints.read_out(module, hidden, coefficient).backward()
        optimizer.step()
    mean, spread = module.name_coefficients(hidden[:1])
    torch.testing.assert_close(mean[0], coefficient.mean(dim=0), atol=0.4, rtol=0)
    assert spread[0, 0, 1] > 2 * spread[0, 0, 0] > 0


def test_readout_is_a_cross_entropy_over_the_integers() -> None:
    """The probabilities of all integers sum to 1; the loss stays finite and pulls back, however far off it is."""
    module = heads()
    hidden = torch.randn(1, 2, 8)
    with torch.no_grad():  # all six distributions are the same, so that the loss is that of each of them
        for head in module.readout:
            head.weight.zero_()
            head.bias.fill_(0.4)
        every = torch.stack([hints.read_out(module, hidden, torch.full((1, 2, 3), n)) for n in torch.arange(-40, 60)])
    assert float((-every).exp().sum()) == pytest.approx(1.0, abs=1e-3)
    assert int(every.argmin()) - 40 == 4
    far = hints.read_out(module, hidden, torch.full((1, 2, 3), 5000.0))
    far.backward()
    assert torch.isfinite(far) and float(module.readout[0].bias.grad[0]) < 0


def test_flow_time_follows_beta_and_the_prefix_is_clean() -> None:
    time, learned = flow.draw_flow_time(20_000, 6, 2, GENERATOR().manual_seed(0))
    assert torch.equal(time > 0, learned)
    prefix = (~learned).sum(dim=1)
    assert set(prefix.tolist()) == {0, 1, 2}
    assert learned[:, 2:].all()
    drawn = time[:, -1]
    # Beta(1.5, 1) has mean 0.6 and variance 0.6857 * ... = 3 / 43.75
    assert float(drawn.mean()) == pytest.approx(0.999 * 0.6 + 0.001, abs=0.01)
    assert float(drawn.var()) == pytest.approx(1.5 / (2.5**2 * 3.5), abs=0.005)
    assert float(drawn.min()) >= 0.001 and float(drawn.max()) <= 1.0
    assert (time.max(dim=1).values == time[:, -1]).all()


def test_flow_mix_and_target_belong_together() -> None:
    torch.manual_seed(0)
    action, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    time = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.25, 0.25]])
    x_t, velocity = flow.mix_flow(action, noise, time)
    torch.testing.assert_close(x_t[0, 0], action[0, 0])
    torch.testing.assert_close(x_t[0, 2], noise[0, 2])
    torch.testing.assert_close(x_t - time[..., None] * velocity, action)  # one exact Euler step leads to the action


def test_flow_loss_leaves_the_prefix_out() -> None:
    velocity, target = torch.ones(1, 3, 2), torch.zeros(1, 3, 2)
    velocity[0, 0] = 100.0
    assert float(flow.match_flow(velocity, target, torch.tensor([[False, True, True]]))) == 1.0


def test_flow_loss_weighs_dimensions_that_other_robots_have() -> None:
    """One row has two dimensions and one of padding, the other three of its own."""
    error, learned = torch.tensor([[[1.0, 2.0, 3.0]] * 2, [[4.0, 5.0, 6.0]] * 2]), torch.ones(2, 2, dtype=torch.bool)
    learned[1, 1] = False
    weight = torch.tensor([[1.0, 1.0, 0.1], [1.0, 1.0, 1.0]])
    by_hand = (2 * (1 + 4 + 0.1 * 9) + 16 + 25 + 36) / (2 * 2.1 + 3)
    got = flow.match_flow(error, torch.zeros_like(error), learned, weight)
    assert float(got) == pytest.approx(by_hand)


def test_losses_without_anything_to_learn_are_zero() -> None:
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    velocity = torch.randn(1, 2, 3, requires_grad=True)
    flow.match_flow(velocity, torch.zeros(1, 2, 3), nothing).backward()
    assert velocity.grad is not None and not velocity.grad.any()
    assert (
        float(
            tokens.predict_postfix(
                torch.nn.Identity(), torch.randn(1, 2, 7), torch.zeros(1, 2, dtype=torch.long), nothing
            )
        )
        == 0.0
    )
    module, unknown = heads(), torch.full((2, 2, 3), torch.nan)
    assert float(hints.read_out(module, torch.randn(2, 2, 8), unknown).detach()) == 0.0
    unlabelled = hints.name_cells(module, torch.randn(1, 2, 6), torch.full((1, 2), NO_TARGET))
    assert float(unlabelled.detach()) == 0.0
    scores = torch.full((1, 2, 5), -torch.inf, requires_grad=True)
    hints.point_at_target(scores, torch.full((1,), NO_TARGET), first_cell=1).backward()
    assert scores.grad is not None and not scores.grad.any()
    one = torch.cat([unknown[:1], torch.zeros(1, 2, 3)])
    hidden = torch.randn(2, 2, 8)
    assert torch.equal(hints.read_out(module, hidden, one), hints.read_out(module, hidden[1:], one[1:]))


def test_background_cells_weigh_a_tenth() -> None:
    module = heads()
    with torch.no_grad():
        module.cells.weight.zero_()
        module.cells.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    log_p = module.cells.bias.log_softmax(0)
    loss = hints.name_cells(module, torch.zeros(1, 2, 6), torch.tensor([[0, 3]]))
    assert float(loss.detach()) == pytest.approx(float(-(log_p[0] + 0.1 * log_p[3]).detach() / 1.1))


def test_grounding_is_zero_only_for_the_right_place_and_state_and_skips_samples_without_a_place() -> None:
    module = heads()
    with torch.no_grad():
        for head in (module.place, module.state):
            head.weight.zero_()
        module.place.bias.copy_(torch.tensor([0.25, 0.75]))
        module.state.bias.fill_(0.5)
    hidden, nowhere = torch.randn(2, 4, 8), [torch.nan, torch.nan]
    right = torch.tensor([[0.25, 0.75], nowhere])
    state = torch.full((2, 3), 0.5)
    assert float(hints.name_place(module, hidden, right).detach()) == 0.0
    assert float(hints.name_place(module, hidden, right.flip(1)).detach()) > 0.1
    assert float(hints.name_place(module, hidden, torch.tensor([nowhere, nowhere])).detach()) == 0.0
    assert float(hints.name_state(module, hidden, state).detach()) == 0.0
    assert float(hints.name_state(module, hidden, -state).detach()) > 0.1


def test_every_second_row_has_a_prefix() -> None:
    _, learned = flow.draw_flow_time(20_000, 6, 3, GENERATOR().manual_seed(0))
    counts = torch.bincount((~learned).sum(dim=1)) / 20_000
    assert counts.tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6], abs=0.02)
    _, learned = flow.draw_flow_time(100, 6, 0, GENERATOR().manual_seed(0))
    assert learned.all()


def test_a_prefix_runs_along_its_chunk_from_another_place_at_another_pace() -> None:
    """On the line a_k = k, the values are the places on the chunk."""
    horizon, rows = 16, 2000
    line = torch.arange(horizon, dtype=torch.float32)[None, :, None].expand(rows, -1, 2)
    _, learned = flow.draw_flow_time(rows, horizon, 8, GENERATOR().manual_seed(0))
    moved, learned_then = flow.run_ahead(line, learned, torch.full((rows,), horizon), 2.0, GENERATOR().manual_seed(1))
    prefix = (~learned).sum(dim=1)
    without = prefix == 0
    torch.testing.assert_close(moved[without], line[without])
    assert torch.equal(learned_then[without], learned[without])
    places, steps = moved[~without, :, 0], moved[~without, :, 0].diff(dim=1)
    start = places[:, 0]
    assert float(start.min()) < -0.9 and float(start.max()) > 1.9 and ((start >= -1.0) & (start <= 2.0)).all()
    inside = torch.arange(horizon - 1)[None, :] < (prefix[~without] - 1)[:, None]
    assert ((steps[inside] >= 0.2 - 1e-5) & (steps[inside] <= 1.2 + 1e-5)).all()
    paces = steps[:, 0][inside[:, 0]]
    assert float(paces.min()) < 0.25 and float(paces.max()) > 1.15
    after = ~inside & learned_then[~without, 1:]
    torch.testing.assert_close(steps[after], torch.ones_like(steps[after]))
    # Actions past the end are held there, and not learned.
    past = learned[~without] & ~learned_then[~without]
    assert past.any() and (places[past] == horizon - 1).all() and (places <= horizon - 1).all()
    assert learned_then.sum(dim=1).min() >= 4
