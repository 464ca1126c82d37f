-- What `keel rank` keeps. Every statement may run again: two processes can begin the same store.

CREATE TABLE IF NOT EXISTS items (
    number    INTEGER PRIMARY KEY,
    key       TEXT NOT NULL UNIQUE,      -- hash of prompt and responses
    prompt    TEXT NOT NULL,             -- JSON: text, or chat messages
    responses TEXT NOT NULL,             -- JSON: texts
    source    TEXT NOT NULL
);

CREATE TABLE IF NOT EXISTS raters (
    name  TEXT PRIMARY KEY NOT NULL,
    token TEXT NOT NULL UNIQUE           -- of the private link
);

-- What the study was told, and keeps until it is told otherwise.
CREATE TABLE IF NOT EXISTS study (
    name  TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL                  -- JSON
);

-- Which write-ahead log goes with this file (data/ahead.py). Each write changes the row, so each log holds it.
CREATE TABLE IF NOT EXISTS log (
    only     INTEGER PRIMARY KEY CHECK (only = 1),
    id       TEXT NOT NULL,              -- random, another one for each log
    previous TEXT NOT NULL,              -- id of the log before
    open     INTEGER NOT NULL CHECK (open IN (0, 1)),  -- whether the log may hold what this file does not
    changes  INTEGER NOT NULL            -- transactions that wrote
);

CREATE TABLE IF NOT EXISTS owner (
    only  INTEGER PRIMARY KEY CHECK (only = 1),
    token TEXT NOT NULL
);

-- An item before a rater. Open until it is judged, or another takes its place.
CREATE TABLE IF NOT EXISTS deals (
    id       TEXT PRIMARY KEY NOT NULL,
    item     INTEGER NOT NULL REFERENCES items (number),
    rater    TEXT NOT NULL REFERENCES raters (name),
    shown    TEXT NOT NULL,              -- JSON: indices of the responses, first on top
    dealt_at REAL NOT NULL,              -- seconds since 1970
    open     INTEGER NOT NULL DEFAULT 1 CHECK (open IN (0, 1))
);
CREATE UNIQUE INDEX IF NOT EXISTS one_open_deal ON deals (rater) WHERE open = 1;
CREATE INDEX IF NOT EXISTS held_items ON deals (item) WHERE open = 1;

-- What raters said. Nothing is ever deleted: who thinks again withdraws the old word.
CREATE TABLE IF NOT EXISTS judgements (
    number       INTEGER PRIMARY KEY,    -- in the order in which they were made
    deal         TEXT NOT NULL UNIQUE REFERENCES deals (id),
    item         INTEGER NOT NULL REFERENCES items (number),
    rater        TEXT NOT NULL REFERENCES raters (name),
    ranks        TEXT,                   -- JSON: of the responses, 1 is best; NULL = cannot judge
    comment      TEXT NOT NULL,
    tags         TEXT NOT NULL,          -- JSON: texts
    seconds      REAL NOT NULL,
    made_at      TEXT NOT NULL,          -- ISO 8601, UTC
    withdrawn_at TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS one_word_each ON judgements (item, rater) WHERE withdrawn_at IS NULL;
CREATE INDEX IF NOT EXISTS words_of_a_rater ON judgements (rater, number);
