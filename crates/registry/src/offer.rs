//! What a pool is to a balancer above: one resource, as busy as its own resources are together.

use std::collections::BTreeMap;

use allocation::{PoolName, Timestamp};

use crate::registry::left_out;
use crate::{Labels, Registry, UnknownPool, Utilization};

/// What the resources that get flows from one of a pool's tables offer together.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Offer {
    /// How many they are. 0: nothing is offered.
    pub resources: u32,
    /// How busy they are together, as a ratio: each counts by its weight, that is by what it can do. What is left to 1 is
    /// their headroom, whatever their number and size. `None`: none of them has reported.
    pub busy: Option<f64>,
    /// Of each dimension that one of them reported, in the same way, over those that did.
    pub dimensions: BTreeMap<String, f64>,
    /// Operations a second of all of them; `None`: not all of them report any.
    pub operations: Option<f64>,
    /// Errors a second of all of them.
    pub errors: f64,
    /// What every one of them has: whichever a flow gets, it gets this.
    pub labels: Labels,
    /// The version that all of them have.
    pub version: Option<String>,
}

/// A mean of values that count by weight.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    sum: f64,
    weights: f64,
}

impl Mean {
    fn add(&mut self, value: f64, weight: f64) {
        self.sum += value * weight;
        self.weights += weight;
    }

    fn get(self) -> Option<f64> {
        (self.weights > 0.0).then(|| self.sum / self.weights)
    }
}

/// An offer as it grows.
#[derive(Debug, Default)]
struct Sum {
    resources: u32,
    busy: Mean,
    dimensions: BTreeMap<String, Mean>,
    operations: f64,
    with_operations: u32,
    errors: f64,
    labels: Option<Labels>,
    version: Option<Option<String>>,
}

impl Sum {
    fn add(
        &mut self,
        utilization: Option<&Utilization>,
        busy: f64,
        weight: f64,
        labels: &Labels,
        version: &str,
    ) {
        self.resources += 1;
        if let Some(utilization) = utilization {
            self.busy.add(busy, weight);
            for (dimension, value) in utilization.ratios() {
                self.dimensions.entry(dimension).or_default().add(value, weight);
            }
            if let Some(rate) = utilization.rate() {
                self.operations += rate;
                self.with_operations += 1;
            }
            self.errors += utilization.errors();
        }
        match &mut self.labels {
            None => self.labels = Some(labels.clone()),
            Some(common) => common.retain(|key, value| labels.get(key) == Some(value)),
        }
        match &mut self.version {
            None => self.version = Some(Some(version.to_owned())),
            Some(common) if common.as_deref() != Some(version) => *common = None,
            Some(_) => {}
        }
    }

    fn offer(self) -> Offer {
        let means = self.dimensions.into_iter().filter_map(|(key, mean)| Some((key, mean.get()?)));
        Offer {
            busy: self.busy.get(),
            dimensions: means.collect(),
            operations: (self.resources > 0 && self.with_operations == self.resources)
                .then_some(self.operations),
            resources: self.resources,
            errors: self.errors,
            labels: self.labels.unwrap_or_default(),
            version: self.version.flatten().filter(|version| !version.is_empty()),
        }
    }
}

impl Registry {
    /// What a pool's resources offer together that may get flows from the table (a place in [`crate::Rebuilt::tables`]).
    ///
    /// # Errors
    /// If there is no such pool.
    pub fn offer(&self, name: &PoolName, table: usize, now: Timestamp) -> Result<Offer, UnknownPool> {
        let index = self.index(name)?;
        let mut sum = Sum::default();
        for entry in self.resources.iter().filter(|entry| entry.pool == index) {
            let pool = self.lock(index);
            if left_out(&pool, &entry, table, now).is_some() {
                continue;
            }
            let row = pool.columns.row(entry.slot);
            let weight = f64::from(if row.weight > 0.0 { row.weight } else { row.registered });
            drop(pool);
            let reported = entry.utilization.as_deref().filter(|_| !row.is_stale(now));
            sum.add(
                reported,
                f64::from(row.utilization),
                weight,
                &entry.labels,
                entry.registration.version(),
            );
        }
        Ok(sum.offer())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RawUtilization;

    fn utilization(cpu: f64, rate: f64) -> Utilization {
        Utilization::parse(RawUtilization { cpu, rate, ..RawUtilization::default() }).unwrap()
    }

    fn labels(of: &[(&str, &str)]) -> Labels {
        of.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn headroom_is_of_the_whole_and_not_of_the_mean_resource() {
        let mut sum = Sum::default();
        // A large one at 90 % and a small one at 10 %: of four parts three are 90 % busy.
        sum.add(
            Some(&utilization(0.9, 90.0)),
            0.9,
            3.0,
            &labels(&[("tls", "true"), ("role", "writer")]),
            "15",
        );
        sum.add(
            Some(&utilization(0.1, 3.0)),
            0.1,
            1.0,
            &labels(&[("tls", "true"), ("role", "reader")]),
            "15",
        );
        let offer = sum.offer();
        assert!((offer.busy.unwrap() - 0.7).abs() < 1e-9, "{offer:?}");
        assert!((offer.dimensions["cpu"] - 0.7).abs() < 1e-9, "{offer:?}");
        assert_eq!((offer.resources, offer.operations), (2, Some(93.0)));
        assert_eq!(offer.labels, labels(&[("tls", "true")]), "what a flow gets whoever gets the flow");
        assert_eq!(offer.version.as_deref(), Some("15"));
    }

    #[test]
    fn who_has_not_reported_is_there_and_says_nothing() {
        let mut sum = Sum::default();
        sum.add(Some(&utilization(0.4, 10.0)), 0.4, 1.0, &labels(&[]), "15");
        sum.add(None, 0.0, 1.0, &labels(&[("a", "b")]), "16");
        let offer = sum.offer();
        assert_eq!((offer.resources, offer.busy, offer.operations), (2, Some(0.4), None));
        assert_eq!((offer.labels.len(), offer.version), (0, None));
        assert_eq!(Sum::default().offer(), Offer::default());
    }
}
