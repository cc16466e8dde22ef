"""What popart.Builder is made of: the op methods as data, the model under construction, shape inference."""
