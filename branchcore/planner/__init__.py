"""Plans a run before it runs: what fits, what one iteration does, what it will take.

request   what is asked: GPUs, model, recipe, settings, and which of them somebody set
subject   the model to plan for: loaded, or a published shape without weights
memory    bytes of every part of an iteration under each way to spread weights
speed     seconds of the model's calls by rows: probed on a device, or from its data sheet
engine    seconds of everything that is no model call, from iterations of a model of one weight
times     seconds of every stage of an iteration
solve     chooses what was left open; refuses what is impossible, with the nearest possible
words     says it in plain language
"""
