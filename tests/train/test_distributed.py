"""Two gloo workers, this process and another, against one with twice the batch: the same gradient."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed, nn
from torch.multiprocessing import get_context
from torch.nn.parallel import DistributedDataParallel

from stas_core import process
from stas_core.data.cohort import CohortRow
from stas_core.train import loop
from stas_core.train.context import LocalContext
from stas_core.train.dataset import TrainingSet
from stas_core.train.recipe import FoldRecipe, FoldTask

CPU = torch.device("cpu")


@dataclass
class GlooContext(LocalContext):
    def wrap(self, model: nn.Module) -> nn.Module:
        return model if self.world_size == 1 else DistributedDataParallel(model)


def first_gradient(recipe: FoldRecipe, rows: list[CohortRow], context: LocalContext) -> torch.Tensor:
    """Return the gradient of the first optimiser step on a rank."""
    process.set_up(context.device, num_threads=context.num_threads, deterministic=True)
    run = loop._start(context, recipe, FoldTask(0, rows, "unused", {}))
    samples = TrainingSet(rows, data=recipe.data, config=recipe.augment, seed=0, num_epochs=3)
    _, _, steps = next(loop._epochs(run, samples))
    run.wrapped.train()
    loop._train_step(run, *next(steps), progress=0.0)
    return torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])


def work(rank: int, recipe: FoldRecipe, rows: list[CohortRow], folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    context = GlooContext(folder, device=CPU, rank=rank, world_size=2)
    torch.save(first_gradient(recipe, rows, context), folder / f"gradient_{rank}.pt")
    distributed.destroy_process_group()


def frozen(recipe: FoldRecipe, batch_size: int, micro_batch_size: int) -> FoldRecipe:
    """Freeze the encoder's BatchNorm: with statistics per worker the equality would not hold mathematically."""
    values = recipe.model_dump()
    values["model"] |= {"batch_norm": "frozen"}
    values["optim"] |= {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    return FoldRecipe.model_validate(values)


def test_two_workers_give_the_gradient_of_one_with_twice_the_batch(
    tmp_path: Path, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> None:
    """Five images: rank 0 takes three in two passes, rank 1 two in one, and the mean is over five."""
    rows = cohort_rows[:5]
    recipe = frozen(tiny_recipe, 5, 2)
    other = get_context("spawn").Process(target=work, args=(1, recipe, rows, tmp_path))
    other.start()
    work(0, recipe, rows, tmp_path)
    other.join()
    assert other.exitcode == 0
    two = [torch.load(tmp_path / f"gradient_{rank}.pt", weights_only=True) for rank in (0, 1)]
    one = first_gradient(frozen(tiny_recipe, 5, 5), rows, LocalContext(tmp_path, device=CPU))
    assert torch.equal(two[0], two[1])
    assert torch.allclose(two[0], one, rtol=0, atol=1e-4 * float(one.abs().max()))
