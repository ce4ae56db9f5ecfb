"""Internals of the methods: capture of attention, gradients, towers, targets, fills."""
