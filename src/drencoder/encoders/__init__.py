"""An encoder turns an update into a short code and back, under one contract (`contract.Encoder`).

A new encoder is one file in this room and one line in the registry; `viability` refuses an encoder that carries nothing, `wire` turns codes into bytes."""
