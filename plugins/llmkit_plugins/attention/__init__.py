"""Ways to mix information along the sequence: softmax attention, linear forms and recurrent networks."""
