"""Draws the images of many requests with one base: engines that a server chooses from. No HTTP, no registry."""
