"""Small experiments on the toys of papers, without a model: `rlpost simulate NAME`."""
