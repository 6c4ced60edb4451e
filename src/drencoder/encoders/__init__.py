"""Encoders: adapter update -> short code -> adapter update, under one contract (`contract.Encoder`).

`identity` sends everything, `sketch` (named "random") a fresh random part, `autoencoder` is the published
convolutional network (`architectures`, `fitting`; `fedcg` is the door for real gradients). `registry` builds them by
name, `gate` refuses those that carry nothing, `wire` turns codes into bytes and back.
"""
