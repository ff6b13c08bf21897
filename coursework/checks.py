"""What grade.py asks of a function besides the project's tests: the form of its result, and a little more."""

from unittest.mock import patch

import torch

import losses
import test_all
import train

FORWARD = train.Objective.forward  # the project's own, before a student's takes its place


def form(value) -> str:
    """What a value is, without its numbers: types, shapes, and whether a gradient reaches it."""
    if isinstance(value, torch.Tensor):
        kind, gradient = str(value.dtype).removeprefix("torch."), "with" if value.requires_grad else "without"
        return f"{kind} of shape {tuple(value.shape)} {gradient} gradient"
    if isinstance(value, tuple):
        return " and ".join(map(form, value))
    return "None" if value is None else f"a {type(value).__name__}"


def form_of_result(name: str) -> dict[str, str]:
    """{"": form of what a function returns for an example}; for a dictionary the form of each of its values.

    Of update_ema, which returns nothing, it is the form of the weights that it leaves.
    """
    result = example(name)
    return {key: form(value) for key, value in (result if isinstance(result, dict) else {"": result}).items()}


def example(name: str):
    """What a function returns for an example."""
    torch.manual_seed(0)
    z, target = torch.randn(2, 3, 4, 6, requires_grad=True), torch.randn(2, 3, 8, 6)  # V K B C, V K B_all C
    if name == "sample_key_mask":
        return losses.sample_key_mask(3, 16, 0.25, torch.Generator().manual_seed(0))
    if name == "mim_loss":
        return losses.mim_loss(z[0], target[0, :, :4])
    if name == "info_nce":
        return losses.info_nce(z[0], target[0], 0.2)
    if name in ("step_loss", "view_loss"):
        return getattr(losses, name)(z, target, 0.2)
    if name == "update_ema":
        teacher = torch.nn.Linear(2, 3)
        losses.update_ema(teacher, torch.nn.Linear(2, 3), 0.9)
        return teacher.weight
    batch = train.draw_batch(test_all.a_config(), test_all.a_cache(), 0, 0, 1)
    return test_all.an_objective(test_all.a_config())(*batch)


def mask_is_the_generators(seed: int = 0) -> None:
    """The same generator gives the same masks, another one other masks; no two rows are alike."""
    first, again, other = (losses.sample_key_mask(8, 64, 0.25, torch.Generator().manual_seed(number))
                           for number in (seed, seed, seed + 1))
    assert torch.equal(first, again), "equal generators give different masks; draw from `generator`."
    assert not torch.equal(first, other), "another generator gives the same mask; draw from `generator`."
    assert len(first.unique(dim=0)) == 8, "different rows have the same mask; draw each row anew."


def what_each_loss_runs(seed: int = 0) -> None:
    """Which networks run, with which mask, what is returned: as in the project's own `Objective.forward`.

    Also with the images of a second process, played by those of the first in reverse order.
    """
    for on in test_all.ALL_LOSSES:
        config, masks, calls = test_all.a_config(losses=on, alpha=0.7), [], []
        batch = train.draw_batch(config, test_all.a_cache(), seed, 0, 1)
        objective = test_all.an_objective(config)
        for net, seen in ((objective.student, masks), (objective.teacher, calls)):
            net.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(kwargs.get("key_mask")), with_kwargs=True)
        result = objective(*batch)
        assert len(masks) == 1, f"--losses {on}: the student runs {len(masks)} times; expected once."
        assert len(calls) == (on != "ar"), \
            f"--losses {on}: the teacher runs {len(calls)} times; expected {int(on != 'ar')}."
        assert calls in ([], [None]), f"--losses {on}: the teacher gets a mask; it sees all keys."
        assert (masks[0] is not None) == ("mim" in on), \
            f"--losses {on}: the student gets {'no' if masks[0] is None else 'a'} mask; only mim gives one."
        expected = FORWARD(objective, *batch)
        assert result.keys() == expected.keys(), \
            f"--losses {on}: returns {', '.join(result)}; expected are {', '.join(expected)}."
        for name in [*list(expected)[1:], "loss"]:  # the sum last: a term of it says more
            test_all.close(f"--losses {on}: {name}", result[name], expected[name])
        assert not objective.teacher.training, "the teacher has been put into training mode."
        with patch.object(losses, "gather_images", lambda x, dim: torch.cat([x, x.flip(dim)], dim)):
            several, expected = objective(*batch), FORWARD(objective, *batch)
        for name in expected:
            test_all.close(f"--losses {on}, two processes: {name}", several[name], expected[name])
        result["loss"].backward()
        trained = [*objective.student.parameters(), *objective.projector.parameters()]
        assert all(p.grad is not None and p.grad.any() for p in trained), \
            f"--losses {on}: no gradient reaches a part of student or projector."
