"""Decoding with the models and engines that people already run, each adapter on its own import."""
