//! The sample map: countries and cities in PostGIS, owned by a user of its own.

use tokio_postgres::Client;

use crate::layout::Layout;
use crate::secrets;
use crate::sessions::{Login, describe, value};

/// Made with Natural Earth (public domain), 1:110m.
const COUNTRIES: &str = include_str!("../../../data/countries.geojson");
const CITIES: &str = include_str!("../../../data/cities.geojson");

/// The database and its owner.
pub const DATABASE: &str = "map";

const SCHEMA: &str = "
CREATE TABLE countries (
  name text NOT NULL, iso_a3 text, continent text, pop_est bigint, gdp_md_est bigint,
  geom geometry(MultiPolygon, 4326) NOT NULL);
CREATE TABLE cities (name text NOT NULL, geom geometry(Point, 4326) NOT NULL);
CREATE INDEX countries_geom ON countries USING gist (geom);
CREATE INDEX cities_geom ON cities USING gist (geom);
ALTER TABLE countries OWNER TO map;
ALTER TABLE cities OWNER TO map;
";

const LOAD_COUNTRIES: &str = "
INSERT INTO countries
SELECT f->'properties'->>'name', f->'properties'->>'iso_a3', f->'properties'->>'continent',
       (f->'properties'->>'pop_est')::float8::bigint, (f->'properties'->>'gdp_md_est')::float8::bigint,
       ST_Multi(ST_SetSRID(ST_GeomFromGeoJSON(f->>'geometry'), 4326))
FROM json_array_elements($1::text::json->'features') f";

const LOAD_CITIES: &str = "
INSERT INTO cities
SELECT f->'properties'->>'name', ST_SetSRID(ST_GeomFromGeoJSON(f->>'geometry'), 4326)
FROM json_array_elements($1::text::json->'features') f";

/// How much was loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Loaded {
    /// Countries.
    pub countries: u64,
    /// Cities.
    pub cities: u64,
}

/// Loads the map through the proxy; `None` when it was there already. Each step can be repeated, so that
/// a load that was interrupted goes on.
pub async fn load(layout: &Layout) -> anyhow::Result<Option<Loaded>> {
    let superuser = Login::superuser(layout)?;
    let client = superuser.connect(layout.proxy_port()).await?;
    if value(
        &client,
        "SELECT count(*) FROM pg_roles WHERE rolname = 'map'",
    )
    .await?
        == "0"
    {
        let password = secrets::read(&layout.secret(secrets::names::MAP))?;
        // The verifier is made here, so that the password reaches neither the server nor its log.
        let verifier = postgres_protocol::password::scram_sha_256(password.as_bytes());
        run(
            &client,
            &format!("CREATE ROLE map LOGIN PASSWORD '{verifier}'"),
        )
        .await?;
    }
    if value(
        &client,
        "SELECT count(*) FROM pg_database WHERE datname = 'map'",
    )
    .await?
        == "0"
    {
        run(&client, "CREATE DATABASE map OWNER map").await?;
    }
    drop(client);
    let mut client = superuser
        .database(DATABASE)
        .connect(layout.proxy_port())
        .await?;
    if value(&client, "SELECT to_regclass('public.cities') IS NOT NULL").await? == "t" {
        return Ok(None);
    }
    run(&client, "CREATE EXTENSION IF NOT EXISTS postgis").await?;
    let transaction = client.transaction().await?;
    transaction.batch_execute(SCHEMA).await.map_err(failed)?;
    let countries = transaction
        .execute(LOAD_COUNTRIES, &[&COUNTRIES])
        .await
        .map_err(failed)?;
    let cities = transaction
        .execute(LOAD_CITIES, &[&CITIES])
        .await
        .map_err(failed)?;
    transaction
        .batch_execute("ANALYZE countries; ANALYZE cities")
        .await
        .map_err(failed)?;
    transaction.commit().await.map_err(failed)?;
    Ok(Some(Loaded { countries, cities }))
}

async fn run(client: &Client, statement: &str) -> anyhow::Result<()> {
    client.batch_execute(statement).await.map_err(failed)
}

#[allow(clippy::needless_pass_by_value, reason = "it is given to map_err")]
fn failed(error: tokio_postgres::Error) -> anyhow::Error {
    anyhow::anyhow!("{}", describe(&error)).context("cannot load the sample map")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_map_is_whole() {
        for (text, at_least) in [(COUNTRIES, 170), (CITIES, 200)] {
            let map: serde_json::Value = serde_json::from_str(text).unwrap();
            assert!(map["features"].as_array().unwrap().len() >= at_least);
        }
    }
}
