"""Where do the bytes live?

Settings, the S3 client, objects and their ranged reader, the bucket's layout, the loader with the names that
people already import, the proof that a bucket works, and a real S3 server on loopback for machines without an
account. Importing this package imports nothing: take what you need from its modules.
"""
