"""Ray, and nothing else imports it.

cluster.py      a local Ray or one that is joined: what it has, waiting for it, lost nodes
context.py      what a stage works with
tasks.py        single tasks                                 search, consensus, k-means, probe
stream.py       images through Ray Data                      embed, predict, fine-tuning
inference.py    the models of that stream, and its results
shards.py       results -> files
train.py        a loop on Ray Train workers                  heads, classifier
worker.py       what such a loop sees;  checkpoints.py
probe.py  finetune.py    the two ways to train a classifier
tune.py         Ray Tune                                     sweeps
compat.py       what Ray does not document
"""
