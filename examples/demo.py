# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Erase fruit from a small CLIP
#
# All of it comes with the package: the model, and its pairs, which are drawings of emoji with
# their names. Real image-text pairs, but no evidence about photographs. On a CPU it takes a few
# minutes.
#
# `demo.ipynb` is made from `demo.py`: `jupytext --to ipynb examples/demo.py`.

# %% tags=["parameters"]
CONCEPT = "food-fruit"  # a group or subgroup of emoji, or a name, such as "animal-bird" or "dog"
CALLED = "fruit"
SETTINGS = {"batch_size": 128, "forget_batch_size": 32}  # a small set needs small batches

# %%
from IPython.display import display

import fasterase
from fasterase.demo import emoji
from fasterase.demo.sets import build_sets

# %% [markdown]
# ## The pairs
#
# What to forget, what to keep, and what the run never sees: other drawings of the same things,
# which are to be forgotten too, and things that no one protected.

# %%
sets = build_sets(CONCEPT, original=str(emoji.BASE_MODEL), seed=0)
print(f"{len(sets.forget)} pairs to forget: {', '.join(sets.concepts)}")
print(f"{len(sets.retain)} pairs to keep, {len(sets.holdout)} held out")
display(*[sets.forget[row]["image"] for row in range(3)])
sets.forget[0]["text"]  # of the first picture; one of them is drawn each time

# %% [markdown]
# ## The erasure
#
# It stops by itself, once the concept is forgotten; a warning would say that it is not.

# %%
result = fasterase.unlearn(
    str(emoji.BASE_MODEL),
    sets.forget,
    sets.retain,
    holdout=sets.holdout,
    sets={"neighbour": sets.neighbour},
    forget_sets={"forget-unseen": sets.unseen},
    concept=CALLED,
    **SETTINGS,
)

# %% [markdown]
# ## The verdict, and pictures before and after
#
# Each picture stands with the three captions closest to it by the original model and by the
# erased one. What went wrong is marked. Below it is every number, with the level of chance and a
# 95 % interval.

# %%
result

# %% [markdown]
# ## What was hurt, by name
#
# Captions of the sets to keep, by the share of their pictures that find them; everyday words
# outside all sets, by the share of their nearest neighbours that stayed.

# %%
evaluation = result.evaluation
print(f"{len(evaluation.hurt)} of them lost something. The worst:")
for each in evaluation.hurt[:15]:
    print("-", each.describe())
print("Words that lost their meaning:", ", ".join(each.word for each in result.words) or "none")

# %% [markdown]
# ## The table as text

# %%
print(evaluation.table())

# %% [markdown]
# ## Keep it
#
# ```python
# result.save("erased")  # open_clip.create_model_and_transforms("local-dir:erased") loads it
# result.report("report.html")  # for people who were not there
# ```
