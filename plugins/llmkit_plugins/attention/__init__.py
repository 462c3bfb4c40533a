"""Ways to mix information along the sequence: softmax attention and recurrent networks."""
