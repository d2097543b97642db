"""Generator servers, from their processes to the rollouts of a rank: the stages of `generator.kind=remote_vllm`."""
