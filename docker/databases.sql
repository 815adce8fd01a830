-- MLflow has the database that the image makes; the studies of sweeps have their own. Both keep the version of their
-- tables in a table alembic_version, so that one database cannot hold both.
CREATE DATABASE sweeps;
