//! A metric registry in which nothing is registered without a name, a help text and a place in the
//! reference (`docs/reference/metrics.md` is rendered from it, and a test keeps the page in step).

use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::EncodeMetric;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

/// A gauge of a fraction or of seconds.
pub type GaugeF64 = Gauge<f64, AtomicU64>;

/// One line of the reference.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MetricDoc {
    /// The name as Prometheus sees it.
    pub name: String,
    /// `counter`, `gauge`, `histogram`, …
    pub kind: &'static str,
    /// What it means, with its unit and labels.
    pub help: &'static str,
}

/// The metrics of one daemon. Handles are kept by those who count; this only reads them when scraped.
///
/// Names follow Prometheus' conventions: `craton_<part>_<what>_<unit>`; counters get their `_total`
/// by themselves.
#[derive(Debug, Default)]
pub struct Metrics {
    registry: Registry,
    catalogue: Vec<MetricDoc>,
}

impl Metrics {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers a counter. `name` without `_total`.
    pub fn counter(&mut self, name: &'static str, help: &'static str) -> Counter {
        let metric = Counter::default();
        self.register(name, help, metric.clone());
        metric
    }

    /// Registers a gauge of whole numbers.
    pub fn gauge(&mut self, name: &'static str, help: &'static str) -> Gauge {
        let metric = Gauge::default();
        self.register(name, help, metric.clone());
        metric
    }

    /// Registers a gauge of seconds or fractions.
    pub fn gauge_f64(&mut self, name: &'static str, help: &'static str) -> GaugeF64 {
        let metric = GaugeF64::default();
        self.register(name, help, metric.clone());
        metric
    }

    /// Registers a histogram with these upper bounds.
    pub fn histogram(
        &mut self,
        name: &'static str,
        help: &'static str,
        bounds: &[f64],
    ) -> Histogram {
        let metric = Histogram::new(bounds.iter().copied());
        self.register(name, help, metric.clone());
        metric
    }

    /// Registers any other metric, for example a `Family` with labels.
    pub fn register(&mut self, name: &'static str, help: &'static str, metric: impl Metric) {
        self.document(name, help, EncodeMetric::metric_type(&metric));
        self.registry
            .register(name, help.trim_end_matches('.'), metric);
    }

    /// Registers a collector that is asked at every scrape, with the documentation of what it emits.
    pub fn register_collector(
        &mut self,
        collector: Box<dyn Collector>,
        emits: &[(&'static str, &'static str, MetricType)],
    ) {
        for (name, help, kind) in emits {
            self.document(name, help, *kind);
        }
        self.registry.register_collector(collector);
    }

    fn document(&mut self, name: &'static str, help: &'static str, kind: MetricType) {
        let name = if matches!(kind, MetricType::Counter) {
            format!("{name}_total")
        } else {
            name.to_owned()
        };
        self.catalogue.push(MetricDoc {
            name,
            kind: kind_name(kind),
            help,
        });
    }

    /// Everything in the text format that Prometheus scrapes.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// What is registered, in the order of registration.
    pub fn catalogue(&self) -> &[MetricDoc] {
        &self.catalogue
    }
}

fn kind_name(kind: MetricType) -> &'static str {
    match kind {
        MetricType::Counter => "counter",
        MetricType::Gauge => "gauge",
        MetricType::Histogram => "histogram",
        MetricType::Info => "info",
        MetricType::Unknown => "unknown",
    }
}

/// Buckets for waits and outages, from a millisecond to half a minute, in seconds.
pub const SECONDS_BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];

/// The reference page of all daemons' metrics. `parts`: a heading and its metrics.
pub fn render_reference(parts: &[(&str, &[MetricDoc])]) -> String {
    let mut page = String::from(
        "# Metrics\n\nGenerated from the code by `make fix`; a test keeps it in step.\n\
         Every daemon serves these at `/metrics` of its HTTP port in the Prometheus text format.\n",
    );
    for (part, docs) in parts {
        // Writing to a String cannot fail.
        let _ = write!(
            page,
            "\n## {part}\n\n| metric | type | meaning |\n|---|---|---|\n"
        );
        for doc in *docs {
            let help = doc.help.replace('|', "\\|");
            let _ = writeln!(page, "| `{}` | {} | {} |", doc.name, doc.kind, help);
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_registered_is_exposed_and_documented() {
        let mut metrics = Metrics::new();
        let failovers = metrics.counter("craton_failovers", "Failovers seen.");
        let lag = metrics.gauge("craton_lag_bytes", "Bytes behind the leader");
        failovers.inc();
        lag.set(7);
        let text = metrics.text().unwrap();
        assert!(text.contains("craton_failovers_total 1"), "{text}");
        assert!(text.contains("craton_lag_bytes 7"), "{text}");
        let page = render_reference(&[("Agent", metrics.catalogue())]);
        assert!(
            page.contains("| `craton_failovers_total` | counter | Failovers seen. |"),
            "{page}"
        );
        assert!(page.contains("| `craton_lag_bytes` | gauge |"), "{page}");
    }
}
